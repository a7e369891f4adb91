"""Direct attribution: sums, each part by hooks, increases by brute force, screening, planted movers, refusals."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import interp
from interp.flow import _increase, attribution
from interp.flow._direct import asked, frozen
from interp.models import load, planted, toy
from interp.models.hooks import run
from interp.models.program import NoProgramError, program
from interp.tasks.task import Task

#: Float32 over three layers: sums of some hundred terms of order ten, taken in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
N_POS = 7
#: Learned positions and biases, grouped keys, parallel layers, one key head, ReLU with biases, norms on queries.
CASES = [
    ("gpt2", "raw"), ("gpt2", "processed"), ("llama", "raw"), ("llama", "processed"), ("gpt_neox", "raw"),
    ("gemma", "raw"), ("mistral", "raw"), ("qwen2", "raw"), ("opt", "raw"), ("opt", "processed"), ("qwen3", "raw"),
    ("phi", "raw"),
]  # fmt: skip

random_model = cache(lambda architecture, weights="raw": toy.random(architecture, weights=weights))


def random_task(model, *, n=4, padded=False):
    tokens = toy.random_tokens(model, n, N_POS)
    mask = torch.ones_like(tokens)
    if padded:
        mask[::2, :2] = 0
    answers, wrong = toy.random_tokens(model, n, 2, seed=5).T
    names = tuple(f"prompt {i}" for i in range(n))
    end = {"end": torch.full((n,), N_POS - 1)}
    return Task("random", names, tokens, "drawn", answers=answers, wrong=wrong, mask=mask if padded else None,
                positions=end)  # fmt: skip


def model_logits(model, task, pos=-1):
    return run(model, task.clean, mask=task.mask).logits[:, pos].float()


def expected_total(model, task, quantity):
    logits, rows = model_logits(model, task), torch.arange(len(task))
    if quantity == "log_prob_increase":
        logits = logits.log_softmax(-1)
    own = logits[rows, task.answers]
    return own - logits[rows, task.wrong] if quantity == "logit_diff" else own


# --- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "weights"), CASES)
def test_all_parts_and_the_biases_sum_to_the_models_own_number(architecture, weights):
    model = random_model(architecture, weights)
    task = random_task(model, padded=architecture in ("gpt2", "llama", "gpt_neox", "opt"))
    for quantity in ("logit", "logit_diff", "log_prob_increase"):
        expected = expected_total(model, task, quantity)
        levels = ("layer", "component") if quantity == "log_prob_increase" else ("layer", "component", "head", "source")
        for by in levels:
            found = attribution.attribute(model, task, by=by, quantity=quantity)
            np.testing.assert_allclose(found.arrays["total"][1], expected, **CLOSE)
            np.testing.assert_allclose(found.table.groupby("prompt")["value"].sum(), expected, **CLOSE)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "opt"])
def test_neurons_sum_to_what_their_layer_writes(architecture):
    model = random_model(architecture)
    task = random_task(model)
    by_component = attribution.attribute(model, task, quantity="logit_diff")
    zero = torch.zeros(1, 1, model.n_heads, model.d_head), torch.zeros(1, 1, model.d_mlp)
    steps = program(model)
    for by, component in (("attention_neuron", "attn_out"), ("neuron", "mlp_out")):
        found = attribution.attribute(model, task, by=by, quantity="logit_diff", top_k=10**6)
        whole = by_component.filter(component=component).table
        layers = whole.pivot(index="prompt", columns="layer", values="value").to_numpy()
        summed = found.table.pivot_table(index="prompt", columns="layer", values="value", aggfunc="sum").to_numpy()
        np.testing.assert_allclose(found.arrays["layers"][1], summed, **CLOSE)
        # What the output bias writes is in no neuron.
        question = asked(model, steps, task, None, "answer", compare=True)
        final = run(model, task.clean, capture=["blocks.2.hook_resid_post"]).cache["blocks.2.hook_resid_post"][:, -1]
        head = frozen(steps, final)
        row = steps.directions(task.answers)[0] - steps.directions(question.wrong)[0]
        written = [
            steps.attn_out(layer, zero[0])[0] if by == "attention_neuron" else steps.mlp_out(layer, zero[1])[0]
            for layer in range(3)
        ]
        bias = torch.stack([(head.pull(row) * each).sum(1) for each in written], 1).detach().numpy()
        np.testing.assert_allclose(layers, summed + bias, **CLOSE)


def test_the_default_model(smol):
    task = interp.tasks.country_capital(smol, 2)
    for by in ("source", "component"):
        found = attribution.attribute(smol, task, by=by, quantity="logit_diff")
        expected = expected_total(smol, task, "logit_diff")
        # The bridge and the program add up in another order, over 30 layers with activations of tens of thousands.
        np.testing.assert_allclose(found.table.groupby("prompt")["value"].sum(), expected, atol=1e-3)
        np.testing.assert_allclose(found.table.groupby("prompt")["value"].sum(), found.arrays["total"][1], atol=1e-4)
    found = attribution.attribute(smol, task[:1], by="neuron", quantity="log_prob_increase", top_k=10)
    assert found.arrays["offered"][1] == 30 * 1536
    assert found.arrays["evaluated"][1] < 400  # hundreds of 46,080, whatever rounding does at the bar


# --- part by part, from TransformerLens's own hooks ----------------------------------------------------------------


def by_hooks(model, task, layer):
    """What each head, source and neuron of a layer writes at the last position, from cached activations."""
    names = [f"blocks.{layer}.{hook}" for hook in ("attn.hook_pattern", "attn.hook_v", "mlp.hook_post")]
    cache = run(model, task.clean, capture=names, mask=task.mask).cache
    pattern, values, post = (cache[name] for name in names)
    attention = model.bridge.blocks[layer].attn
    values = values.repeat_interleave(model.n_heads // values.shape[2], 2)  # groups written out
    weighted = pattern[:, :, -1, :, None] * values.transpose(1, 2)  # [batch head k_pos d_head]
    written = weighted[..., None] * attention.W_O[None, :, None]  # [batch head k_pos d_head d_model]
    return written.detach(), (post[:, -1, :, None] * model.bridge.blocks[layer].mlp.W_out).detach()


def to_logits(model, task, vectors):
    """The final norm at the true stream's scale and the unembedding, by the modules' formulas: `[batch ... vocab]`."""
    name = f"blocks.{model.n_layers - 1}.hook_resid_post"
    final = run(model, task.clean, capture=[name], mask=task.mask).cache[name][:, -1]
    norm = model.bridge.ln_final.original_component
    if isinstance(norm, torch.nn.LayerNorm):
        scale = final.var(-1, unbiased=False, keepdim=True).add(norm.eps).sqrt()
        vectors = vectors - vectors.mean(-1, keepdim=True)
    else:
        scale = final.pow(2).mean(-1, keepdim=True).add(norm.variance_epsilon).sqrt()
    scale = scale.view(len(final), *[1] * (vectors.ndim - 1))
    return (vectors / scale * norm.weight) @ model.bridge.unembed.W_U


@pytest.mark.parametrize(("architecture", "padded"), [("gpt2", False), ("llama", True), ("opt", True)])
def test_every_neuron_is_what_the_hooks_say(architecture, padded):
    model = random_model(architecture)
    task = random_task(model, padded=padded)
    rows = torch.arange(len(task))
    tables = {by: attribution.attribute(model, task, by=by, top_k=10**6).table for by in ("attention_neuron", "neuron")}
    heads = attribution.attribute(model, task, by="head").filter(component="z").table
    for layer in range(3):
        attention, mlp = by_hooks(model, task, layer)
        own = to_logits(model, task, attention)[rows, ..., task.answers].detach().numpy()
        table = tables["attention_neuron"].query("layer == @layer")
        index = [table[name].to_numpy(dtype=int) for name in ("prompt", "head", "k_pos", "neuron")]
        np.testing.assert_allclose(table["value"], own[tuple(index)], **CLOSE)
        table = heads.query("layer == @layer")
        index = [table[name].to_numpy(dtype=int) for name in ("prompt", "head")]
        np.testing.assert_allclose(table["value"], own.sum((2, 3))[tuple(index)], **CLOSE)
        own = to_logits(model, task, mlp)[rows, ..., task.answers].detach().numpy()
        table = tables["neuron"].query("layer == @layer")
        np.testing.assert_allclose(table["value"], own[table["prompt"], table["neuron"].to_numpy(dtype=int)], **CLOSE)
        assert len(table) == own.size
    magnitudes = tables["neuron"].query("prompt == 1")["value"].abs().to_numpy()
    assert (np.diff(magnitudes) <= 0).all()


# --- log-probability increases -------------------------------------------------------------------------------------


@torch.no_grad()
def brute_force(model, task, kind):
    """Imp of every part by its definition, each beside its own x, in float64: {(prompt, layer, ...): value}."""
    found = {}
    for prompt in range(len(task)):
        one = task[prompt : prompt + 1]
        names = [f"blocks.{layer}.hook_{site}" for layer in range(3) for site in ("resid_pre", "attn_out")]
        cache = run(model, one.clean, capture=[*names, "blocks.2.hook_resid_post"], mask=one.mask).cache
        # The biases of norm and unembedding: what the model's own logits have beside the linear part.
        linear = to_logits(model, one, cache["blocks.2.hook_resid_post"][:, -1])
        constant = (model_logits(model, one) - linear).double()
        for layer in range(3):
            x = cache[f"blocks.{layer}.hook_resid_pre"][:, -1]
            attention, mlp = by_hooks(model, one, layer)
            if kind == "neuron":
                x, parts = x + cache[f"blocks.{layer}.hook_attn_out"][:, -1], mlp
            else:
                sums = {"attention_neuron": (), "source": (3,), "head": (2, 3)}[kind]
                parts = attention.sum(sums) if sums else attention
            flat = parts[0].flatten(0, -2)
            both = to_logits(model, one, torch.cat([x, x + flat])[None])[0].double() + constant
            log_p = both.log_softmax(-1)[:, int(one.answers[0])]
            values = (log_p[1:] - log_p[0]).view(parts.shape[1:-1])
            found.update({(prompt, layer, *index): float(values[index]) for index in np.ndindex(*values.shape)})
    return found


COLUMNS = {
    "neuron": ["prompt", "layer", "neuron"],
    "head": ["prompt", "layer", "head"],
    "source": ["prompt", "layer", "head", "k_pos"],
    "attention_neuron": ["prompt", "layer", "head", "k_pos", "neuron"],
}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("gpt2", "neuron"), ("llama", "neuron"), ("llama", "attention_neuron"), ("opt", "source"), ("gpt_neox", "neuron"),
     ("llama", "head"), ("opt", "attention_neuron")],
)  # fmt: skip
def test_the_strongest_are_those_of_brute_force(architecture, kind):
    model = random_model(architecture)
    task = random_task(model, n=2, padded=True)
    found = attribution.attribute(model, task, by=kind, quantity="log_prob_increase", top_k=12)
    slow = brute_force(model, task, kind)
    table = found.table if kind != "head" else found.filter(component="z").table
    for row in table.itertuples():
        key = tuple(int(getattr(row, name)) for name in COLUMNS[kind])
        assert abs(row.value - slow[key]) < 2e-5  # float32 log-probabilities of order ten
    if kind == "head":
        return
    for prompt in range(2):
        best = sorted((value for key, value in slow.items() if key[0] == prompt), reverse=True)[:12]
        np.testing.assert_allclose(table.query("prompt == @prompt")["value"], best, atol=2e-5)
        assert len(table.query("prompt == @prompt")) == 12
        assert int(found.arrays["evaluated"][1][prompt]) <= int(found.arrays["offered"][1][prompt]) < len(slow)


def test_screening_evaluates_few_and_misses_none(monkeypatch):
    model = toy.random("llama", scale=0.1)  # small weights, so that most neurons do little
    task = random_task(model, n=3)
    found = attribution.attribute(model, task, by="neuron", quantity="log_prob_increase", top_k=5)
    assert found.arrays["offered"][1].tolist() == [3 * model.d_mlp] * 3
    assert (found.arrays["evaluated"][1] < 0.6 * 3 * model.d_mlp).all()
    monkeypatch.setattr(_increase, "_SLACK", float("inf"))  # everything is near enough to be evaluated
    every = attribution.attribute(model, task, by="neuron", quantity="log_prob_increase", top_k=5)
    assert every.arrays["evaluated"][1].tolist() == [3 * model.d_mlp] * 3
    np.testing.assert_array_equal(found.table[["layer", "neuron"]], every.table[["layer", "neuron"]])
    np.testing.assert_allclose(found.table["value"], every.table["value"], atol=1e-6)


@torch.no_grad()
def test_no_increase_is_above_its_bound():
    generator = torch.Generator().manual_seed(0)
    model = random_model("llama")
    steps = program(model)
    final = torch.randn(1, 32, generator=generator)
    head = frozen(steps, final)
    base = _increase.bases(head, torch.randn(2, 32, generator=generator), 7)
    for size in (1e-2, 1.0, 30.0):
        vectors = size * torch.randn(50, 32, generator=generator)
        exact = _increase.increases(head, base, 1, vectors, 7)
        bounds = vectors @ base.bound[1]
        assert (exact <= bounds + 1e-4 * (1 + bounds.abs())).all()
    # And the bound is the first-order increase: finite differences.
    small = 1e-2 * vectors / 30
    np.testing.assert_allclose(
        _increase.increases(head, base, 0, small, 7), small @ base.bound[0], rtol=0.05, atol=2e-4
    )


# --- batches, modes, planted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["logit", "log_prob_increase"])
def test_batches_do_not_see_each_other(monkeypatch, quantity):
    model = random_model("llama")
    task = random_task(model)
    for by in ("component", "head", "neuron"):
        together = attribution.attribute(model, task, by=by, quantity=quantity, top_k=4)
        with monkeypatch.context() as patch:
            patch.setattr("interp.flow.attribution.prompts_at_once", lambda task: 1)
            alone = attribution.attribute(model, task, by=by, quantity=quantity, top_k=4)
        np.testing.assert_allclose(together.table["value"], alone.table["value"], atol=2e-5)
        assert together.table.drop(columns="value").equals(alone.table.drop(columns="value"))


def test_padding_changes_nothing():
    model = random_model("gpt2")
    task = random_task(model, n=1)
    wide = torch.cat([torch.ones(1, 3, dtype=torch.long), task.clean], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, N_POS)], 1).long()
    padded = Task("random", task.prompts, wide, "drawn", answers=task.answers, wrong=task.wrong, mask=mask)
    for by in ("source", "attention_neuron", "neuron"):
        for quantity in ("logit_diff", "log_prob_increase"):
            one, other = (attribution.attribute(model, t, by=by, quantity=quantity, top_k=9) for t in (task, padded))
            np.testing.assert_allclose(one.table["value"], other.table["value"], atol=2e-5)
            if "k_pos" in one.table:
                shifted = (one.table["k_pos"] + 3).fillna(-1).astype(int)
                np.testing.assert_array_equal(shifted, other.table["k_pos"].fillna(-1).astype(int))


def test_raw_and_processed_weights_agree():
    raw, processed = (toy.random("gpt2", weights=weights) for weights in ("raw", "processed"))
    task = random_task(raw)
    for quantity in ("logit_diff", "log_prob_increase"):
        one, other = (
            attribution.attribute(m, task, by="head", quantity=quantity).filter(component="z") for m in (raw, processed)
        )
        if quantity == "logit_diff":
            # Folding moves value biases to the output bias, so a head's part may differ; layers' do not.
            one, other = (attribution.attribute(m, task, by="layer", quantity=quantity) for m in (raw, processed))
        np.testing.assert_allclose(one.arrays["total"][1], other.arrays["total"][1], **CLOSE)
        if quantity == "logit_diff":
            pair = [r.filter(component=["embed", "layer"]).table["value"] for r in (one, other)]
            np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-3)


def test_an_earlier_position_and_other_targets():
    model = random_model("llama")
    task = random_task(model)
    cut = Task("cut", task.prompts, task.clean[:, :4], "drawn", answers=task.answers)
    at3 = attribution.attribute(model, task, by="source", pos=3)
    short = attribution.attribute(model, cut, by="source", pos=None)
    np.testing.assert_allclose(at3.table["value"], short.table["value"], atol=1e-5)
    predicted = attribution.attribute(model, task.clean, target="prediction")
    best = model_logits(model, task)
    np.testing.assert_array_equal(predicted.arrays["target"][1], best.argmax(-1))
    np.testing.assert_allclose(predicted.arrays["total"][1], best.amax(-1), **CLOSE)
    given = attribution.attribute(model, task.clean, target=best.argmax(-1))
    np.testing.assert_array_equal(given.table["value"], predicted.table["value"])


def test_planted_movers_write_the_answer():
    case = planted.ioi_like()
    task = Task("ioi_like", case.prompts, case.clean, "planted", answers=case.answers, wrong=case.wrong,
                positions=case.positions)  # fmt: skip
    heads = attribution.attribute(case.model, task, by="head", quantity="logit_diff").filter(component="z")
    means = heads.table.groupby(["layer", "head"])["value"].mean()
    writers = {tuple(map(int, at)) for at in means.index[means.abs() > 0.1]}
    assert writers == {*case.truth["mover"], *case.truth["negative"]}
    assert means[(2, 1)] > means[(2, 2)] > 0 > means[(2, 3)]
    sources = attribution.attribute(case.model, task, by="attention_neuron", quantity="log_prob_increase", top_k=1)
    assert {tuple(map(int, row)) for row in sources.table[["layer", "head"]].to_numpy()} == {(2, 1)}
    np.testing.assert_array_equal(sources.table["k_pos"], case.positions["io"])


def test_bfloat16_runs_in_float32_sums():
    model = load(toy.random_module("llama").to(torch.bfloat16), tokenizer=toy.tokenizer(), weights="raw")
    task = random_task(model)
    found = attribution.attribute(model, task, by="source")
    # The stream itself is rounded to 8 bits after each addition, the parts are not: hundredths of logits of ten.
    np.testing.assert_allclose(found.table.groupby("prompt")["value"].sum(), found.arrays["total"][1], atol=0.5)
    top = attribution.attribute(model, task, by="neuron", quantity="log_prob_increase", top_k=3)
    assert np.isfinite(top.table["value"]).all()


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_is_refused():
    model = random_model("llama")
    task = random_task(model)
    bare = Task("bare", task.prompts, task.clean, "drawn")
    with pytest.raises(ValueError, match="has no answers: take target='prediction'"):
        attribution.attribute(model, bare)
    with pytest.raises(ValueError, match="no wrong answers"):
        attribution.attribute(model, bare, quantity="logit_diff", target="prediction")
    with pytest.raises(ValueError, match="target='best'"):
        attribution.attribute(model, task, target="best")
    with pytest.raises(ValueError, match="one token id of 0 to 63"):
        attribution.attribute(model, task, target=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="has no position 'relation'"):
        attribution.attribute(model, task, pos="relation")
    with pytest.raises(ValueError, match="is padding"):
        attribution.attribute(model, random_task(model, padded=True), pos=0)
    with pytest.raises(ValueError, match="top_k=0"):
        attribution.attribute(model, task, top_k=0)
    with pytest.raises(ValueError, match="at least one prompt"):
        attribution.attribute(model, torch.zeros(3, dtype=torch.long), target="prediction")
    with pytest.raises(NoProgramError, match="caps its logits"):
        attribution.attribute(toy.random("gemma2", weights="raw"), task)
