"""Does a step along a true lens's direction raise exactly its token, and a random one nothing in particular?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.lenses import controls, steering
from interp.lenses.attention import direct
from interp.models import toy
from interp.models.hooks import run
from interp.models.program import program


@pytest.fixture(scope="module")
def truth(linear):
    w_o = program(linear.model).w_o(0).detach()
    return replace(direct(linear.model), estimand="additive", maps={0: w_o}, biases={0: torch.zeros(14)})


def test_a_copying_head_raises_the_token_and_no_other_more(linear, truth):
    tokens = list(range(linear.words, linear.words + 10))
    found = steering.steer(
        linear.model, linear.prompts(5, seed=1), {"truth": truth}, heads=[(0, 0)], tokens=tokens, doses=(0.5, 1.0, 2.0),
    )  # fmt: skip
    assert len(found.table) == 5 * 10 * 3 * 3
    assert (found.filter(metric="rank").table["value"] == 0).all()
    logit = found.filter(metric="logit").table
    assert (logit["value"] > logit["value_random_high"]).all()
    assert (logit["value_share"] == 1).all()
    # The logits are linear in z: the rise is the dose times that of one length.
    wide = logit.pivot_table(index=["prompt", "token"], columns="value_dose", values="value")
    assert (wide[2.0] / wide[0.5]).to_numpy() == pytest.approx(4, rel=1e-4)


def test_a_suppressor_is_steered_backwards(linear, truth):
    # Its own direction of a word lies against its copy of the word; pushed the other way it lowers the word.
    found = steering.steer(
        linear.model, linear.prompts(3, seed=1), {"truth": truth}, heads=[(0, 1)], tokens=[linear.words],
        doses=(-1.0, 1.0),
    ).filter(metric="log_prob").table  # fmt: skip
    assert (found[found["value_dose"] == 1]["value"] > 0).all()
    assert (found[found["value_dose"] == -1]["value"] < 0).all()
    z = steering._z(linear.model, steering.as_task(linear.model, linear.prompts(20)), [(0, 1)])[:, 0]
    push = steering._directions(linear.model, {"truth": truth}, (0, 1), [linear.words], 1, 0)[0]
    reads = z[linear.prompts(20)[:, 2] == linear.words]
    assert bool((reads @ push < 0).all())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rises_are_those_of_plain_hooks(architecture):
    model = toy.random(architecture, weights="raw")  # processed, the unembedding is centred, and so are all logits
    tokens = toy.random_tokens(model, 3, 8)
    lenses = {"a": replace(direct(model), estimand="additive")}
    lenses["b"] = controls.randomised(lenses["a"])
    heads, asked, doses = [(1, 2), (0, 3)], [7, 9], (0.5, 2.0)
    found = (
        steering.steer(model, tokens, lenses, heads=heads, tokens=asked, doses=doses, n_random=3, seed=1)
        .table.set_index(["layer", "head", "component", "value_dose", "token", "metric", "prompt"])
        .sort_index()
    )
    assert len(found) == 3 * 2 * 2 * 2 * 2 * 3
    clean = run(model, tokens, capture=["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"])
    before = clean.logits[:, -1]
    unembed = program(model).unembed.weight.T.detach()
    for layer, head in heads:
        name = f"blocks.{layer}.attn.hook_z"
        length = clean.cache[name][:, -1, head].norm(dim=-1).mean()

        def moved(direction, dose, name=name, head=head, length=length):
            def put(activation, hook):
                activation = activation.clone()
                activation[:, -1, head] += dose * length * direction / direction.norm()
                return activation

            return run(model, tokens, hooks=[(name, put)]).logits[:, -1]

        drawn = np.random.default_rng([1, layer, head]).standard_normal((3, model.d_head))
        for dose in doses:
            random = [moved(torch.from_numpy(each).float(), dose) for each in drawn]
            for token in asked:
                others = torch.stack([logit_of(after - before, token) for after in random])
                for component, lens in lenses.items():
                    full = lens.maps[layer][head] @ unembed
                    after = moved(full[:, token] - full.mean(-1), dose)
                    at = (layer, head, component, dose, model.to_str_tokens([token])[0])
                    rise = after - before
                    own = found.loc[(*at, "logit")]
                    # Logits of order 10 in float32, through another order of the same sums.
                    assert own["value"].to_numpy() == pytest.approx(logit_of(rise, token).numpy(), abs=2e-4)
                    assert own["value_random"].to_numpy() == pytest.approx(others.mean(0).numpy(), abs=2e-4)
                    assert own["value_random_high"].to_numpy() == pytest.approx(others.amax(0).numpy(), abs=2e-4)
                    share = (others < logit_of(rise, token)).float().mean(0).numpy()
                    assert own["value_share"].to_numpy() == pytest.approx(share, abs=1e-6)
                    log_prob = after.log_softmax(-1)[:, token] - before.log_softmax(-1)[:, token]
                    assert found.loc[(*at, "log_prob"), "value"].to_numpy() == pytest.approx(log_prob.numpy(), abs=2e-4)
                    rank = -(rise > rise[:, token, None]).sum(-1)
                    assert (found.loc[(*at, "rank"), "value"].to_numpy() == rank.numpy()).all()


def logit_of(rise, token):
    return rise[:, token] - rise.mean(-1)


def test_a_full_map_gives_the_same_direction(linear, truth):
    unembed = program(linear.model).unembed.weight.T.detach()
    full = replace(truth, form="full", maps={0: truth.maps[0] @ unembed})
    options = {"heads": [(0, 0), (0, 2)], "tokens": [5, 8], "n_random": 2}
    one, other = (
        steering.steer(linear.model, linear.prompts(3), {"lens": lens}, **options).table["value"].to_numpy()
        for lens in (truth, full)
    )
    assert one == pytest.approx(other, abs=1e-4)  # logits of order 10 in float32


def test_batches_change_nothing_and_heads_draw_for_themselves(linear, truth, monkeypatch):
    def values(**options):
        return steering.steer(linear.model, linear.prompts(5), {"truth": truth}, tokens=[6], **options).table

    both = values(heads=[(0, 0), (0, 2)])
    alone = values(heads=[(0, 2)])
    assert both[both["head"] == 2]["value_random"].tolist() == pytest.approx(alone["value_random"].tolist(), abs=1e-6)
    monkeypatch.setattr(steering, "_ROOM", 2 * 14)
    cut = values(heads=[(0, 0), (0, 2)])
    for name in ("value", "value_random", "value_random_high"):
        assert cut[name].tolist() == pytest.approx(both[name].tolist(), abs=1e-5)  # other batches, other roundings


def test_refusals(linear, truth):
    flat = replace(truth, maps={0: torch.zeros_like(truth.maps[0])})
    tokens = linear.prompts(2)
    for lens, options, message in (
        (flat, {}, "no direction to move along"),
        (truth, {"tokens": [14]}, r"tokens=\[14\]"),
        (truth, {"heads": [(1, 0)]}, r"head \(1, 0\)"),
        (truth, {"n_random": 0}, "n_random=0"),
    ):
        with pytest.raises(ValueError, match=message):
            steering.steer(linear.model, tokens, {"lens": lens}, **({"heads": [(0, 0)], "tokens": [5]} | options))
