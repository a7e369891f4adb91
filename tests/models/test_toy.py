"""Do the toys have the mechanisms that were planted in them?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.models import Model, run, toy


@pytest.fixture(scope="module")
def inductor() -> Model:
    return toy.induction()


def repeated(order: list[int]) -> torch.Tensor:
    return torch.tensor([[*order, *order]])


# --- the induction pair


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(12)).flatmap(lambda p: st.integers(2, 12).map(lambda n: list(p)[:n])))
def test_induction_continues_every_repeated_sequence(order: list[int]) -> None:
    model = cached()
    tokens = repeated(order)
    guesses = model(tokens)[0].argmax(-1).tolist()
    n = len(order)
    assert guesses[n : 2 * n - 1] == order[1:]
    assert guesses[2 * n - 1] == order[0]  # after the last token came the first


def cached(_made: list[Model] = []) -> Model:  # noqa: B006  (hypothesis takes no module fixture)
    if not _made:
        _made.append(toy.induction())
    return _made[0]


def test_induction_is_sure_where_it_can_be_and_knows_nothing_before(inductor: Model) -> None:
    tokens = repeated([2, 7, 4, 9, 3, 11])
    log_probs = inductor(tokens)[0].log_softmax(-1)
    right = log_probs[:-1].gather(-1, tokens[0, 1:, None])[:, 0]
    assert right[6:].exp().min() > 0.95
    assert right[:5].exp().max() < 0.5


def test_the_two_heads_attend_where_they_should(inductor: Model) -> None:
    n = 8
    tokens = repeated([5, 2, 11, 8, 3, 10, 4, 7])
    names = ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    previous, induction = (run(inductor, tokens, capture=names).cache[name][0] for name in names)
    later = torch.arange(1, 2 * n)
    assert previous[0, later, later - 1].min() > 0.95
    second = torch.arange(n, 2 * n)
    assert induction[0, second, second - n + 1].min() > 0.95  # one after the last time this token was seen
    # The other heads have no scores: they attend evenly to all they can see.
    even = torch.tril(torch.ones(2 * n, 2 * n)) / torch.arange(1, 2 * n + 1)[:, None]
    torch.testing.assert_close(previous[1], even)
    torch.testing.assert_close(induction[1], even)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head", [0, 1])
def test_only_the_planted_heads_matter(inductor: Model, layer: int, head: int) -> None:
    tokens = repeated([5, 2, 11, 8, 3, 10])

    def ablate(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        z[:, :, head] = 0
        return z

    ablated = run(inductor, tokens, hooks=[(f"blocks.{layer}.attn.hook_z", ablate)]).logits
    guesses, truth = ablated[0, 6:-1].argmax(-1), tokens[0, 7:]
    if head == 0:
        assert (guesses == truth).float().mean() < 0.5
    else:
        assert torch.equal(ablated, inductor(tokens))


def test_the_mlps_write_nothing(inductor: Model) -> None:
    names = [f"blocks.{layer}.hook_mlp_out" for layer in (0, 1)]
    cache = run(inductor, repeated([4, 5, 6]), capture=names).cache
    assert all(cache[name].abs().max() == 0 for name in names)


def test_another_size_of_inductor_works_and_an_impossible_one_is_refused() -> None:
    model = toy.induction(n_words=20, context=30)
    order = [19, 2, 14, 8, 3, 17, 11, 6, 10]
    assert model(repeated(order))[0, 9:-1].argmax(-1).tolist() == order[1:]
    with pytest.raises(ValueError, match=r"context=60 and n_words=4 leave a head too narrow .*raise n_words"):
        toy.induction(n_words=4, context=60)


# --- the inflated dimension


@pytest.mark.parametrize(
    ("layer", "feature", "token", "value"),
    [(1, 3, 0, 5000.0), (0, 31, 0, 800.0), (2, 9, 4, 5000.0), (1, 17, 2, -3000.0)],
)
def test_one_entry_is_inflated_at_exactly_one_place(layer: int, feature: int, token: int, value: float) -> None:
    model = toy.inflated(layer=layer, feature=feature, token=token, value=value)
    names = [f"blocks.{index}.hook_resid_post" for index in range(3)]
    cache = run(model, toy.random_tokens(model, 6, 9), capture=[*names, f"blocks.{layer}.mlp.hook_post"]).cache
    for index, name in enumerate(names):
        stream = cache[name].abs()
        if index >= layer:
            # The neuron reads a normalised entry among small random ones: right to two per cent.
            planted = cache[name][:, token, feature]
            torch.testing.assert_close(planted, torch.full_like(planted, value), rtol=0.02, atol=0)
            stream[:, token, feature] = 0
        assert stream.max() < 100
    neurons = cache[f"blocks.{layer}.mlp.hook_post"]
    assert (neurons[:, token].argmax(-1) == 0).all()
    neurons[:, token] = 0
    assert neurons[:, :, 0].abs().max() < 1e-3  # silent everywhere else
    assert model.weights == "raw"


# --- the random ones


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_random_weights_are_the_seeds_alone(architecture: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in toy.random_module(architecture, seed=seed).parameters()])

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = weights(4)
    toy.random(architecture)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(weights(4), first)
    assert (weights(5) - first).abs().max() > 0.5
    assert toy.random(architecture, seed=4).fingerprint == toy.random(architecture, seed=4).fingerprint
    assert toy.random(architecture, seed=4).fingerprint != toy.random(architecture, seed=5).fingerprint


@pytest.mark.parametrize("build", [toy.inflated, toy.induction])
def test_planted_toys_leave_the_global_generator_alone(build: object) -> None:
    state = torch.random.get_rng_state()
    first = build()  # type: ignore[operator]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.fingerprint == build().fingerprint  # type: ignore[operator]


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_random_attention_is_far_from_uniform(architecture: str) -> None:
    # A toy whose heads all attend evenly would forgive a method that mixes them up.
    model = toy.random(architecture)
    pattern = run(model, toy.random_tokens(model, 4, 12), capture=["blocks.1.attn.hook_pattern"]).cache
    last = pattern["blocks.1.attn.hook_pattern"][:, :, -1]
    assert last.max(-1).values.mean() > 0.2  # uniform is 1/12
    assert (last[:, 0] - last[:, 1]).abs().max() > 0.1


def test_mistrals_window_is_eight() -> None:
    model = toy.random("mistral")
    name = "blocks.0.attn.hook_pattern"
    pattern = run(model, toy.random_tokens(model, 1, 20), capture=[name]).cache[name][0]
    assert pattern[:, 19, :12].max() == 0
    assert pattern[:, 19, 12:].min() > 0


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="architecture 'lama' is not known; use one of gpt2, llama, gpt_neox"):
        toy.random_module("lama")


def test_random_tokens_are_the_seeds_and_never_special() -> None:
    model = toy.random("llama")
    tokens = toy.random_tokens(model, 200, 10, seed=3)
    assert torch.equal(tokens, toy.random_tokens(model, 200, 10, seed=3))
    assert not torch.equal(tokens, toy.random_tokens(model, 200, 10, seed=4))
    assert set(tokens.flatten().tolist()) == set(range(2, 64))


def test_the_tokenizer_is_words() -> None:
    tokenizer = toy.tokenizer()
    assert tokenizer("w2 w63 w17")["input_ids"] == [2, 63, 17]
    assert tokenizer.decode([5]) == "w5"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 64)
    assert len(toy.tokenizer(12)) == 12
