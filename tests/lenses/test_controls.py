"""Do the controls destroy what they say, and keep the rest?"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from interp.lenses import controls, evaluation
from interp.lenses.attention import direct
from interp.lenses.cached import cache
from interp.models import toy
from interp.models.program import program


@pytest.fixture(scope="module")
def model():
    return toy.random("llama")


@pytest.fixture(scope="module")
def lens(model):
    generator = torch.Generator().manual_seed(0)
    own = direct(model)
    biases = {layer: torch.randn(4, 64, generator=generator) for layer in own.maps}
    return replace(own, estimand="independent", biases=biases)


def test_every_head_gets_its_neighbours_lens(lens):
    other = controls.exchanged(lens)
    for layer, maps in lens.maps.items():
        for head in range(4):
            assert torch.equal(other.maps[layer][head], maps[head - 1])
            assert torch.equal(other.biases[layer][head], lens.biases[layer][head - 1])
    shared = replace(lens, estimand="additive", biases={layer: torch.ones(64) for layer in lens.maps})
    assert controls.exchanged(shared).biases is not lens.biases
    assert all(torch.equal(bias, torch.ones(64)) for bias in controls.exchanged(shared).biases.values())


def test_a_rotation_keeps_the_singular_values_and_undoes_itself(lens):
    other = controls.rotated(lens, seed=3)
    for layer, maps in lens.maps.items():
        turned = other.maps[layer]
        # Singular values of order 1 in float32.
        assert torch.allclose(torch.linalg.svdvals(turned), torch.linalg.svdvals(maps), atol=1e-4)
        assert not torch.allclose(turned, maps, atol=0.1)
        # turned = Q maps, and maps has full rank, so Q = turned maps^+ is orthogonal.
        q = turned.double() @ torch.linalg.pinv(maps.double())
        assert torch.allclose(q @ q.mT, torch.eye(8, dtype=torch.float64).expand(4, 8, 8), atol=1e-3)
    assert torch.equal(controls.rotated(lens, seed=3).maps[1], other.maps[1])
    assert not torch.equal(controls.rotated(lens, seed=4).maps[1], other.maps[1])


def test_a_random_lens_is_as_large(lens):
    other = controls.randomised(lens, seed=1)
    for layer, maps in lens.maps.items():
        drawn = other.maps[layer]
        assert torch.allclose(drawn.flatten(1).norm(dim=1), maps.flatten(1).norm(dim=1), rtol=1e-4)
        alike = torch.cosine_similarity(drawn.flatten(1), maps.flatten(1))
        # Of 256 entries: the cosine of independent ones is about 1/16.
        assert bool((alike.abs() < 0.25).all())


@pytest.fixture(scope="module")
def judged(linear, tmp_path_factory):
    """Controls of the true lens of the linear model, both as additive and as independent lens."""
    place = tmp_path_factory.mktemp("judged")
    train, test = (
        cache(linear.model, linear.prompts(n, same=0.0, seed=n), skip=4, dtype="float32", folder=place / str(n))
        for n in (90, 60)
    )
    w_o = program(linear.model).w_o(0).detach()
    truth = replace(direct(linear.model), estimand="additive", maps={0: w_o}, biases={0: torch.zeros(14)})
    return linear.model, truth, train, test


def test_no_control_of_the_true_lens_explains_anything(judged):
    model, truth, train, test = judged
    share = evaluation.shares(controls.controls(model, truth, test, train=train)).table.set_index("component")["value"]
    assert share["own"] == pytest.approx(1, abs=1e-6)
    # The true logits of other words are as wrong as they were right.
    assert share[["another head", "rotated", "shuffled"]].max() < 0
    assert share["constant"] == 0


def test_shuffled_positions_are_those_of_another_token(judged):
    model, truth, train, test = judged
    found = controls.controls(model, truth, test, train=train, seed=5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    logits = test.r @ program(model).unembed.weight.T.detach()
    own = found.filter(component="shuffled").table.set_index("prompt")["value"]
    for i in range(60):
        log_p, log_q = logits[i].log_softmax(-1), logits[order[i]].log_softmax(-1)
        # The true lens says exactly what the model says of the other token; sums of 14 numbers.
        assert own[i] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), abs=1e-5)


def test_sentence_ends_are_found_through_closing_quotes(smol):
    pieces = ["The end.", '"Stop!"', "He left (why?).", "No. 5", "Mr"]
    tokens = [torch.tensor(smol.tokenizer(piece)["input_ids"]) for piece in pieces]
    last = [bool(controls._sentence_ends(smol, ids)[-1]) for ids in tokens]
    assert last == [True, True, True, False, False]
    assert not bool(controls._sentence_ends(smol, tokens[0])[0])


def named(model):
    """The model with a tokenizer in which tokens 2 to 9 end a sentence."""
    decode = SimpleNamespace(decode=lambda ids: '."' if 2 <= ids[0] < 10 else "word", bos_token_id=0)
    return replace(model, tokenizer=decode)


def test_the_audit_is_that_of_whole_arrays(model, tmp_path):
    spoken = named(model)
    tokens = toy.random_tokens(model, 12, 40)
    train, test = (
        cache(model, tokens[rows], skip=2, dtype="float32", folder=tmp_path / name)
        for name, rows in (("train", slice(8)), ("test", slice(8, 12)))
    )
    found = controls.position_audit(spoken, test, train=train, seed=2).table
    p = model(tokens)[:, 2:].softmax(-1)
    ends = (tokens[:, 2:] >= 2) & (tokens[:, 2:] < 10)
    final, rest = p[:8][ends[:8]], p[:8][~ends[:8]]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(2))[: len(final)]
    for kind, mean, mask in (("sentence end", final.mean(0), ends[8:]), ("elsewhere", rest[drawn].mean(0), ~ends[8:])):
        own = found[found["component"] == kind].set_index("prompt")
        for i in range(4):
            some = p[8 + i][mask[i]]
            assert own.loc[i, "value_tokens"] == len(some)
            kl = (some * (some.log() - mean.log())).sum(-1).mean()
            # Sums over 64 tokens in float32.
            assert own.loc[i, "value"] == pytest.approx(float(kl), abs=2e-5)
            assert own.loc[i, "value_entropy"] == pytest.approx(float(-(some * some.log()).sum(-1).mean()), abs=2e-5)


def test_refusals(model, lens, tmp_path):
    single = replace(lens, maps={layer: maps[:1] for layer, maps in lens.maps.items()})
    with pytest.raises(ValueError, match="one head a layer"):
        controls.exchanged(single)
    train, test = (
        cache(model, toy.random_tokens(model, 2, 12, seed=seed), folder=tmp_path / str(seed)) for seed in (0, 1)
    )
    with pytest.raises(ValueError, match="no sentence's end"):
        controls.position_audit(model, test, train=train)
