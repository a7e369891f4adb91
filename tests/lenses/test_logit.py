"""Logit lens: the definition by brute force, the output exactly, weight modes, caps, padding, memory, refusals."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import interp
from interp.lenses import _output, _reading
from interp.lenses.logit import logit_lens
from interp.models import toy
from interp.models.hooks import run
from interp.tasks.task import Task

#: Float32: log-probabilities of size 10 after products of 32 terms, in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
#: LayerNorm and RMSNorm, with and without biases, grouped keys, parallel layers, gains about 1, norms after, a cap.
ARCHITECTURES = [*toy.ARCHITECTURES, *toy.VARIANTS]
N_POS = 6

random_model = cache(lambda architecture, weights="raw": toy.random(architecture, weights=weights))


def random_task(model, *, n=3, padded=False):
    tokens = toy.random_tokens(model, n, N_POS, seed=3)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :2] = 0
        tokens[1, :2] = model.pad_token
    answers = toy.random_tokens(model, n, 1, seed=5)[:, 0]
    return Task("random", tuple("abc"[:n]), tokens, "drawn", answers=answers, mask=mask if padded else None,
                positions={"end": torch.full((n,), N_POS - 1), "second": torch.arange(n) % 2 + 2})  # fmt: skip


@torch.no_grad()
def by_hand(model, h):
    """Log-probabilities of streams, by the Hugging Face module's own parts in float64."""
    module = model.bridge.original_model
    base = module.base_model
    base = getattr(base, "decoder", base)
    norms = [getattr(base, name, None) for name in ("ln_f", "norm", "final_layer_norm", "final_layernorm")]
    norm = next(part for part in norms if part is not None)
    norm = getattr(norm, "original_component", norm)
    head = module.get_output_embeddings()
    head = getattr(head, "original_component", head)
    logits = torch.nn.functional.linear(
        norm(h).double(), head.weight.double(), None if head.bias is None else head.bias.double()
    )
    cap = getattr(module.config, "final_logit_softcapping", None)
    return (logits if cap is None else cap * (logits / cap).tanh()).log_softmax(-1)


def cell(found, **conditions):
    (row,) = found.filter(**conditions).table.to_dict("records")
    return SimpleNamespace(**row)


# --- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_is_the_definition_and_the_last_is_the_model(architecture):
    model = random_model(architecture)
    task = random_task(model, padded=True)
    sites = ["resid_pre", "attn_out", "mlp_out"]
    found = logit_lens(model, task, sites=sites, k=4)
    names = {(site, layer): f"blocks.{layer}.hook_{site}" for site in sites for layer in range(3)}
    names["resid_pre", 3] = "blocks.2.hook_resid_post"
    seen = run(model, task.clean, capture=list(dict.fromkeys(names.values())), mask=task.mask)
    real = np.argwhere(task.mask.numpy())
    assert len(found.table) == len(names) * len(real)
    log_p = seen.logits.double().log_softmax(-1)
    rows = {
        tuple(row): i for i, row in enumerate(found.table[["src", "layer", "prompt", "pos"]].itertuples(index=False))
    }
    for (site, layer), name in names.items():
        log_q = by_hand(model, seen.cache[name])
        for prompt, pos in real:
            index = rows[site, layer, prompt, pos]
            row, q, p = found.table.iloc[index], log_q[prompt, pos], log_p[prompt, pos]
            target = task.clean[prompt, pos + 1] if pos + 1 < N_POS else task.answers[prompt]
            expected = {
                "value": q[target], "value_cross_entropy": -q[target], "value_rank": (q > q[target]).sum(),
                "value_entropy": -(q.exp() * q).sum(), "value_max_probability": q.max().exp(),
                "value_forward_kl": (p.exp() * (p - q)).sum(), "value_reverse_kl": (q.exp() * (q - p)).sum(),
            }  # fmt: skip
            for column, number in expected.items():
                np.testing.assert_allclose(row[column], float(number), **CLOSE, err_msg=column)
            assert row["token"] == f"w{int(q.argmax())}" or int(q.argmax()) < 2
            top = q.topk(4)
            assert found.arrays["top_tokens"][1][index].tolist() == top.indices.tolist()
            np.testing.assert_allclose(found.arrays["top_log_probs"][1][index], top.values, **CLOSE)
    output = found.filter(src="resid_pre", layer=3).table
    assert (output[["value_forward_kl", "value_reverse_kl", "value_js_divergence"]] == 0).all(axis=None)
    # Not the same numbers taken twice: the lens of the last stream is the model's own pass, its unembedding included.
    theirs = [float(log_p[row.prompt, row.pos].max().exp()) for row in output.itertuples()]
    np.testing.assert_allclose(output["value_max_probability"], theirs, **CLOSE)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "opt", "gemma2"])
def test_raw_and_processed_weights_read_the_stream_alike(architecture):
    raw, processed = (random_model(architecture, weights) for weights in ("raw", "processed"))
    first, second = (logit_lens(model, random_task(model)).table for model in (raw, processed))
    assert first["token"].equals(second["token"])
    columns = [name for name in first.columns if name.startswith("value")]
    # Folding multiplies gains into weights: another rounding of each weight.
    np.testing.assert_allclose(first[columns], second[columns], rtol=1e-3, atol=1e-3)


def test_a_cap_on_logits_is_applied(monkeypatch):
    model = random_model("gemma2")
    way = _output.output(model)
    assert way.cap == model.bridge.original_model.config.final_logit_softcapping
    h = 3 * torch.randn(4, model.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        capped, bare = way.log_probs(h), way._replace(cap=None).log_probs(h)
    assert float((capped - bare).abs().max()) > 1e-3
    # A model whose logits are something else is refused, by a look at its own.
    monkeypatch.setattr(_output, "_build", lambda model: way._replace(cap=None))
    monkeypatch.setattr(_output, "_KNOWN", {})
    with pytest.raises(ValueError, match="something else stands between"):
        _output.output(model)


def test_the_default_model_reads_as_hugging_face_does(smol_raw):
    model = smol_raw
    tokens = model.tokenize("The capital of France is").ids
    found = logit_lens(model, tokens, layers=[10, 29, 30], positions=-1, k=3)
    with torch.no_grad():
        hidden = model.bridge.original_model(tokens, output_hidden_states=True)
        for layer in (10, 29):
            expected = by_hand(model, hidden.hidden_states[layer][0, -1]).topk(3)
            at = found.table.index[found.table["layer"] == layer][0]
            assert found.arrays["top_tokens"][1][at].tolist() == expected.indices.tolist()
            # 576 terms, then a logarithm of 49,152: about 1e-5 of logits up to 40.
            np.testing.assert_allclose(found.arrays["top_log_probs"][1][at], expected.values, atol=5e-4)
    assert cell(found, layer=30).token == model.to_str_tokens([int(hidden.logits[0, -1].argmax())])[0]


# --- what may not change a number ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_batches_tiles_and_padding_change_nothing(architecture, monkeypatch):
    model = random_model(architecture)
    task = random_task(model, padded=True)
    together = logit_lens(model, task)
    monkeypatch.setattr(_reading, "_TOKENS", 1)
    monkeypatch.setattr(_output, "_TILE", 3 * model.d_vocab)
    apart = logit_lens(model, task)
    np.testing.assert_allclose(together.table["value_forward_kl"], apart.table["value_forward_kl"], **CLOSE)
    assert together.table[["prompt", "layer", "pos", "token", "target"]].equals(
        apart.table[["prompt", "layer", "pos", "token", "target"]]
    )
    alone = logit_lens(model, Task("one", ("b",), task.clean[1:2, 2:], "", answers=task.answers[1:2]))
    own = together.filter(prompt=1).table
    assert (own["pos"] >= 2).all()
    for column in ("value", "value_rank", "value_js_divergence"):
        np.testing.assert_allclose(own[column], alone.table[column], **CLOSE)
    assert own["pos"].tolist() == (alone.table["pos"] + 2).tolist()


def test_no_tile_is_wider_than_it_may_be(monkeypatch):
    model = random_model("llama")
    rows = []
    original = _output.Output.logits
    monkeypatch.setattr(_output, "_TILE", 4 * model.d_vocab)
    monkeypatch.setattr(_output.Output, "logits", lambda self, h: rows.append(len(h)) or original(self, h))
    logit_lens(model, toy.random_tokens(model, 5, 10))
    # Four places, of which the output is made once for all: no [layer pos vocab] and no [pos vocab].
    assert max(rows) == 4
    assert sum(rows) == 4 * 50


# --- positions and targets -----------------------------------------------------------------------------------------


def test_positions_by_name_and_index_and_each_kind_of_target():
    model = random_model("llama")
    task = random_task(model)
    every = logit_lens(model, task)
    some = logit_lens(model, task, positions=["second", -1], layers=[1])
    assert sorted(some.table[["prompt", "pos"]].itertuples(index=False, name=None)) == [
        (0, 2), (0, 5), (1, 3), (1, 5), (2, 2), (2, 5)
    ]  # fmt: skip
    for row in some.table.itertuples():
        assert row.value == pytest.approx(cell(every, prompt=row.prompt, layer=1, pos=row.pos).value, abs=1e-5)
    words = [f"w{int(token)}" for token in task.answers]
    assert every.filter(layer=0, pos=5).table["target"].tolist() == words
    assert every.filter(layer=0, pos=0).table["target"].tolist() == [f"w{int(t)}" for t in task.clean[:, 1]]
    answer = logit_lens(model, task, target="answer", layers=[2])
    assert answer.filter(prompt=1).table["target"].tolist() == [words[1]] * N_POS
    ids = logit_lens(model, task, target=task.answers, layers=[2])
    assert ids.table["value"].tolist() == answer.table["value"].tolist()
    bare = logit_lens(model, task.clean, layers=[2])
    assert bare.filter(pos=5).table["value"].isna().all()
    assert bare.filter(pos=5).table["target"].isna().all()
    assert not bare.filter(pos=4).table["value"].isna().any()


def test_lower_precision_reads_in_float32():
    model = toy.random("llama")
    task = random_task(model)
    expected = logit_lens(model, task)
    lower = interp.load(toy.random_module("llama"), tokenizer=toy.tokenizer(), dtype="bfloat16")
    found = logit_lens(lower, task)
    # bfloat16 keeps 8 bits of logits of size 10; of probabilities summed in it, entropies would be off by per cents.
    assert float((found.table["value_entropy"] - expected.table["value_entropy"]).abs().mean()) < 0.1
    sums = np.exp(logit_lens(lower, task, k=64).arrays["top_log_probs"][1]).sum(1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "z"}, "use one or several of resid_pre"),
        ({"layers": [4]}, "layers 0 to 3 .3 is the output"),
        ({"layers": [3], "sites": "mlp_out"}, "layers 0 to 2"),
        ({"layers": []}, "no layers were given"),
        ({"positions": "subject"}, "no position 'subject'"),
        ({"positions": 0}, "position 0 of prompt 1 is padding"),
        ({"target": "wrong"}, "use 'next', 'answer'"),
        ({"target": torch.tensor([1, 2, 64])}, "token id of 0 to 63"),
        ({"k": 0}, "keep from 1 to 64"),
    ],
)
def test_what_is_not_there_is_refused(options, message):
    model = random_model("llama")
    with pytest.raises(ValueError, match=message):
        logit_lens(model, random_task(model, padded=True), **options)


def test_ids_of_another_tokenizer_and_missing_answers_are_refused():
    model = random_model("llama")
    with pytest.raises(ValueError, match="made for another tokenizer"):
        logit_lens(model, torch.tensor([[2, 64]]))
    with pytest.raises(ValueError, match="has no answers"):
        logit_lens(model, torch.tensor([[2, 3]]), target="answer")
    with pytest.raises(ValueError, match="is an? encoder model"):
        logit_lens(interp.load("minilm-l6"), torch.tensor([[2, 3]]))
