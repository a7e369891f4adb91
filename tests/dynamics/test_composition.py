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
    rows = [(tuple(t), a) for t, a in zip(*(part.tolist() for part in made.held_out), strict=True)]
    doubles = set()
    singles = set()
    for tokens, targets in [*drawn(made), *rows]:
        equals = 2 + 7 + 3
        assert made.d_vocab == equals + 1
        if tokens[2] == equals:
            x, f = tokens[0] - 2, tokens[1] - 9
            assert tokens[3] == 1 and targets == [IGNORED, IGNORED, 2 + tables[f][x], IGNORED]
            singles.add((x, f))
        else:
            x, f, g = tokens[0] - 2, tokens[1] - 9, tokens[2] - 9
            assert tokens[3] == equals and targets == [IGNORED] * 3 + [2 + tables[g][tables[f][x]]]
            doubles.add((x, f, g))
    assert len(singles) == 7 * 3, "every fact is trained on"
    assert len(doubles) == 7 * 3 * 3, "and every combination is drawn or held out"


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


def test_shares_and_seeds() -> None:
    made = function_composition(7, 3, single=0.25)
    short = sum(tokens[3] == 1 for tokens, _ in drawn(made)) / 4000
    # a share of 4,000 draws has a standard error of 0.7%
    assert short == pytest.approx(0.25, abs=0.03)
    assert not any(tokens[3] == 1 for tokens, _ in drawn(function_composition(7, 3, single=0.0), 500))
    assert drawn(made, 50) == drawn(function_composition(7, 3, single=0.25), 50)
    other = function_composition(7, 3, seed=1)
    assert not torch.equal(other.held_out[0], made.held_out[0])
    assert not torch.equal(function_tables(7, 3), function_tables(7, 3, seed=1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n_symbols=1, n_functions=3: at least 2 and 1 are needed"):
        function_composition(1, 3)
    with pytest.raises(ValueError, match="single=1.0"):
        function_composition(single=1.0)
    with pytest.raises(ValueError, match="modulus=1"):
        double_sum(1)
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"held_out={share} of 125 combinations"):
            double_sum(5, held_out=share)
