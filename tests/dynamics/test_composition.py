from __future__ import annotations

import pytest
import torch

from interp.dynamics.composition import Synthetic, double_sum, function_composition, function_tables
from interp.dynamics.train import IGNORED


def drawn(made: Synthetic, n: int = 4000, seed: int = 0) -> list[tuple[tuple[int, ...], list[int]]]:
    """Prompts with their targets, as lists."""
    tokens, targets = made.batch(torch.Generator().manual_seed(seed), n)
    assert tokens.shape == targets.shape == (n, made.n_ctx)
    return [(tuple(one), other) for one, other in zip(tokens.tolist(), targets.tolist(), strict=True)]


def test_compositions_are_those_of_the_tables() -> None:
    made = function_composition(7, 3, held_out=0.3, seed=4)
    tables = function_tables(7, 3, seed=4).tolist()
    assert all(sorted(table) == list(range(7)) for table in tables), "permutations: no favourite value"
    assert made.d_vocab == 2 + 7 + 3 + 1
    combinations, facts = set(), set()
    held_out = [(tuple(one), other) for one, other in zip(*(part.tolist() for part in made.held_out), strict=True)]
    for trained, prompts in ((True, drawn(made)), (False, held_out)):
        for tokens, targets in prompts:
            x, f, g, equals = tokens[0] - 2, tokens[1] - 9, tokens[2] - 9, tokens[3]
            assert equals == 12
            single = 2 + tables[f][x] if trained else IGNORED
            assert targets == [IGNORED, single, IGNORED, 2 + tables[g][tables[f][x]]]
            combinations.add((x, f, g))
            if trained:
                facts.add((x, f))
    assert len(facts) == 7 * 3, "every fact is trained on"
    assert len(combinations) == 7 * 3 * 3, "and every combination is drawn or held out"


@pytest.mark.parametrize("made", [function_composition(7, 3, held_out=0.3), double_sum(5, held_out=0.3)])
def test_held_out_combinations_are_never_drawn(made: Synthetic) -> None:
    held_out = {tuple(tokens) for tokens in made.held_out[0].tolist()}
    assert len(held_out) == len(made.held_out[0]) in (round(0.3 * 63), round(0.3 * 125))
    assert not held_out & {tokens for tokens, _ in drawn(made)}


def test_sums_of_three() -> None:
    made = double_sum(5, seed=2)
    assert made.d_vocab == 9
    for tokens, targets in drawn(made, 300):
        a, plus, b, also, c, equals = tokens
        assert (plus, also, equals) == (7, 7, 8)
        assert targets == [IGNORED] * 5 + [2 + (a + b + c - 6) % 5]


def test_seeds() -> None:
    made = function_composition(7, 3)
    assert drawn(made, 50) == drawn(function_composition(7, 3), 50)
    other = function_composition(7, 3, seed=1)
    assert not torch.equal(other.held_out[0], made.held_out[0])
    assert not torch.equal(function_tables(7, 3), function_tables(7, 3, seed=1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n_symbols=1, n_functions=3: at least 2 of each are needed"):
        function_composition(1, 3)
    with pytest.raises(ValueError, match="modulus=1"):
        double_sum(1)
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"held_out={share} of 125 combinations is .*: 1 to 100 are needed"):
            double_sum(5, held_out=share)
