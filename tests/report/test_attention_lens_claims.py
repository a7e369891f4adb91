"""Numbers that the claims of Attention Lens ask for: planted heads are found, and hand-made tables counted right."""

from __future__ import annotations

import csv
import inspect

import numpy as np
import pandas as pd
import pytest
import torch

from interp.core.places import shipped
from interp.core.result import Result
from interp.lenses.attention import AttentionLens, direct
from interp.lenses.cached import cache
from interp.models import toy
from interp.models.hooks import run
from interp.report.claims import Untestable
from interp.report.papers import attention_lens as paper
from interp.tasks import occupations


def _heads(values: np.ndarray, method: str = "x") -> Result:
    """A Result of `[prompt layer head]`, whose layers are 5, 6, ..."""
    prompt, layer, head = (index.ravel() for index in np.indices(values.shape))
    table = pd.DataFrame({"prompt": prompt, "layer": layer + 5, "head": head, "value": values.ravel()})
    return Result(method, table, "logits", arrays={"value": (("prompt", "layer", "head"), values)})


def test_joint_error_is_rounding_and_sees_a_wrong_map(monkeypatch, tmp_path):
    model = toy.random("llama")
    cached = cache(model, toy.random_tokens(model, 3, 20), folder=tmp_path)
    lens = direct(model)
    scaled = AttentionLens("additive", "low_rank", lens.maps, lens.biases, lens.meta)
    # Sums of some hundred products in float32.
    assert paper.joint_error(model, scaled, cached) < 1e-5
    written = AttentionLens.written
    monkeypatch.setattr(AttentionLens, "written", lambda self, *args, **options: written(self, *args, **options) * 1.01)
    assert paper.joint_error(model, scaled, cached) == pytest.approx(0.01, rel=0.01)


def test_content_words():
    tokens = [" castle", " the", "castle", " and", " x1yz", " river", ",", " Their"]
    table = pd.DataFrame({
        "prompt": 0, "pos": 1, "layer": 0, "head": [0] * 7 + [-1], "component": ["a"] * 4 + ["b"] * 4, "token": tokens,
        "metric": ["promotes"] * 6 + ["suppresses", "promotes"], "value": 1.0,
    })  # fmt: skip
    found = paper.content_words(Result("reading.top_tokens", table, "logits"))
    assert found.to_dict() == {"a": 1 / 4, "b": 1 / 2}


def test_the_head_that_tells_injections_apart_is_found_and_judged_on_other_prompts():
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(40, 2, 3)) for name in ("plain", "injected", "mentioned")}
    values["injected"][:, 1, 2] += 20
    values["mentioned"][:, 1, 2] += 20
    values["injected"][::2, 0, 1] += 1.5  # on the prompts that choose, but less
    found = paper.injection_curves({name: _heads(each) for name, each in values.items()})
    assert found[["layer", "head"]].to_numpy().tolist() == [[6, 2], [6, 2]]
    assert found.loc["plain", ["chosen on", "held out"]].tolist() == [1.0, 1.0]
    assert 0.2 < found.loc["mentioned", "held out"] < 0.8
    values["injected"][1::2] -= 100
    turned = paper.injection_curves({name: _heads(each) for name, each in values.items()})
    assert turned.loc["plain", ["chosen on", "held out"]].tolist() == [1.0, 0.0]


def test_the_biased_head_is_chosen_on_even_pairs_and_judged_on_odd_ones():
    values = np.random.default_rng(0).normal(size=(24, 2, 3))
    values[:, 0, 1] += 8
    assert paper.bias_head(_heads(values)) == {"layer": 5, "head": 1, "share": 1.0}
    values[1:7:2, 0, 1] = -1  # 3 of the 12 odd pairs
    assert paper.bias_head(_heads(values))["share"] == 0.75


def test_lost_lean_is_that_of_a_run_with_the_head_at_its_mean(smol):
    people = occupations(smol, 3)
    layer, head, name = 20, 0, "blocks.20.attn.hook_z"
    found = paper.lost_lean(smol, people, layers=[layer])
    task = people.task
    both = torch.cat([task.clean, task.corrupt])
    mask = None if task.mask is None else task.mask.repeat(2, 1)
    before = run(smol, both, mask=mask, capture=[name])
    real = torch.ones(both.shape, dtype=torch.bool) if mask is None else mask.bool()
    mean = before.cache[name][real][:, head].mean(0)

    def put(z, hook):
        z[:, -1, head] = mean
        return z

    after = run(smol, both, mask=mask, hooks=[(name, put)])

    def lean(logits):
        return logits[:, -1, people.women].mean(-1) - logits[:, -1, people.men].mean(-1)

    lost = lean(before.logits) - lean(after.logits)
    want = lost[:3] - lost[3:]
    rows = found.table[found.table["head"] == head]
    assert rows["layer"].unique().tolist() == [layer]
    # Two ways through 30 layers in float32, of numbers of the order 0.1.
    assert np.abs(rows["value"].to_numpy() - want.numpy()).max() < 2e-4
    assert np.abs(want.numpy()).max() > 2e-3


def _table(rows: dict[str, list], unit: str = "nats") -> Result:
    frame = pd.DataFrame(rows)
    return Result("x", frame.astype({name: "Int64" for name in ("layer", "head") if name in frame}), unit)


def _case() -> dict[str, object]:
    """Two layers of two heads, with numbers small enough to count by hand."""
    n = None
    shares = _table({
        "layer": [0, 0, 0, 1, 1, 1, 0, 0, 1, 1], "head": [n] * 6 + [0, 1, 0, 1],
        "component": ["additive", "direct", "tuned"] * 2 + ["independent"] * 4,
        "value": [0.5, -1.0, 0.6, 0.1, 0.2, 0.05, 0.3, 0.2, 0.0, 0.15],
    })  # fmt: skip
    audited = _table({
        "layer": [0] * 6, "head": [0, 1] * 3, "component": ["own"] * 2 + ["another head"] * 2 + ["shuffled"] * 2,
        "value": [0.4, 0.2, 0.1, 0.02, -0.1, 0.01],
    })  # fmt: skip
    seeds = _table({
        "prompt": [0, 1] * 2, "layer": [0] * 4, "component": ["additive"] * 4, "value_draw": [0, 0, 1, 1],
        "value": [1.0, 2.0, 1.0, 3.0], "value_tokens": [30, 10, 30, 10],
    })  # fmt: skip
    special = _table({
        "layer": [0, 0, 1, 1], "metric": ["divergence", "information"] * 2, "value": [0.3, 0.5, 0.1, 0.3],
        "value_null": [0.0, 0.1, 0.0, 0.1], "value_null_high": [0.2, 0.2, 0.2, 0.2],
    })  # fmt: skip
    tokens = pd.DataFrame({
        "prompt": 0, "pos": 1, "layer": 0, "head": 0, "component": ["independent"] * 2 + ["direct"] * 2,
        "token": [" castle", " river", " the", " music"], "metric": "promotes", "value": 1.0,
    })  # fmt: skip
    faithful = _table({
        "prompt": [0] * 6, "layer": [0] * 6, "head": [0, 0, 0, 1, 1, 1], "target": ["total"] * 6,
        "component": ["additive", "independent", "direct"] * 2, "metric": ["spearman"] * 6,
        "value": [0.6, 0.1, 0.2, 0.2, 0.3, 0.4],
    })  # fmt: skip
    steered = _table({
        "prompt": [0] * 4, "layer": [0] * 4, "head": [0, 0, 1, 1], "token": ["a", "b"] * 2, "metric": ["logit"] * 4,
        "value": [1.0, 1.0, 1.0, 1.0], "value_random_high": [0.5, 2.0, 0.5, 0.5],
    })  # fmt: skip
    ends = _table({
        "prompt": [0, 1, 0], "component": ["sentence end"] * 2 + ["elsewhere"], "value": [1.0, 3.0, 4.0],
        "value_tokens": [3, 1, 10],
    })  # fmt: skip
    rng = np.random.default_rng(0)
    lean = rng.normal(size=(8, 2, 2)) * 0.01 + np.array([[5.0, 1.0], [2.0, 3.0]])
    values = {name: rng.normal(size=(20, 2, 2)) for name in ("plain", "injected", "mentioned")}
    values["injected"][:, 1, 0] += 20
    values["mentioned"][:, 1, 0] += 40
    return {
        "joint": 0.125, "explained": shares, "audited": audited, "seeds": seeds, "special": special,
        "overlap": _table({"layer": [0, 0], "head": [0, 1], "value": [0.2, 0.4]}),
        "tokens": Result("reading.top_tokens", tokens, "logits"), "faithful": faithful, "steered": steered,
        "ends": ends, "leaning": _heads(lean), "lost": _heads(-lean),
        "injected": {name: _heads(each) for name, each in values.items()},
    }  # fmt: skip


def test_each_claims_number_is_the_one_counted_by_hand():
    found = paper.measured(**_case())
    assert isinstance(found.pop("head_9_8"), Untestable)
    assert found == pytest.approx({
        "one_map": 0.125, "sum_predicts": 0.3, "beats_direct": 0.5, "below_tuned": 0.5, "sum_over_head": 0.5,
        "one_head": 0.175, "shuffled": 0.01, "own_lens": 0.06 / 0.3, "stable": 0.3, "convex": 0.25 / 1.375,
        "specialised": 0.3 / np.log(2), "specialised_p": 0.5, "content_words": 0.5, "faithful": 0.4,
        "faithful_direct": 0.5, "sign": 0.5, "steers": 0.75, "sentence_end": 1.5 / 4, "bias_head": 1.0,
        "bias_causal": -1.0, "injection_head": 1.0, "injection_mention": 0.0,
    })  # fmt: skip


def test_every_claim_has_a_number():
    path = shipped("data") / "papers" / "attention_lens" / "claims.csv"
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    claims = {row["id"] for row in csv.DictReader(rows)}
    source = inspect.getsource(paper.measured)
    assert all(f'"{claim}": ' in source for claim in claims)
