"""Contrast of words in a lens: the same as reading the whole vocabulary, for every kind of lens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.lenses._final import final_norm
from interp.lenses.attention import AttentionLens, direct
from interp.lenses.contrast import contrast
from interp.models import toy
from interp.models.hooks import run
from interp.tasks.task import Task


def _task(model, n: int = 5, length: int = 9) -> Task:
    tokens = toy.random_tokens(model, n, length)
    where = torch.tensor([length - 1, 3, 4, length - 1, 2])
    return Task("random", tuple("abcde"), tokens, "made here", positions={"end": where})


def _lens(model, form: str, estimand: str) -> AttentionLens:
    """Random maps of layers 2 and 0."""
    generator = torch.Generator().manual_seed(0)
    width = model.d_model if form == "low_rank" else model.d_vocab
    maps = {n: torch.randn(model.n_heads, model.d_head, width, generator=generator) for n in (2, 0)}
    shape = (model.n_heads, model.d_vocab) if estimand == "independent" else (model.d_vocab,)
    return AttentionLens(
        estimand, form, maps, {n: torch.randn(shape, generator=generator) for n in maps}, model.provenance
    )


def _brute(model, lens, task, first, second):
    """The whole vocabulary of every head, a prompt at a time."""
    norm, rows = final_norm(model), []
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    for i in range(len(task)):
        names = {layer: f"blocks.{layer}.attn.hook_z" for layer in lens.layers}
        cache = run(model, task.clean[i : i + 1], capture=[*names.values(), last]).cache
        at = int(task.positions["end"][i])
        stream = cache[last][0, at : at + 1]
        scale = norm.inverse_scale(stream, norm.norm(stream))
        row = []
        for layer, name in names.items():
            logits = lens.logits(model, layer, cache[name][0, at : at + 1], scale=scale)[0]
            if lens.estimand == "independent":
                logits = logits - lens.biases[layer]
            own = first if first.ndim == 1 else first[i]
            other = second if second is None or second.ndim == 1 else second[i]
            row.append(logits[:, own].mean(1) - (logits if other is None else logits[:, other]).mean(1))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    "kind", ["direct", "low_rank additive", "low_rank independent", "full additive", "full independent"]
)
def test_equals_the_whole_vocabulary(arch, kind):
    model = toy.random(arch)
    task = _task(model)
    lens = direct(model) if kind == "direct" else _lens(model, *kind.split())
    each = torch.tensor([[1, 4], [2, 2], [5, 0], [3, 7], [6, 1]])
    for first, second in ((torch.tensor([3, 5]), torch.tensor([1])), (each, None), (each, each.flip(0)[:, :1])):
        found = contrast(model, lens, task, first, second)
        want = _brute(model, lens, task, first, second)
        # Sums of d_model products in another order, in float32.
        torch.testing.assert_close(torch.tensor(found.arrays["value"][1]).float(), want, rtol=2e-4, atol=2e-5)
    frame = found.table[(found.table["prompt"] == 1) & (found.table["layer"] == lens.layers[-1])]
    assert frame["head"].tolist() == list(range(model.n_heads))
    assert frame["value"].tolist() == found.arrays["value"][1][1, -1].tolist()


def test_padding_and_batches_change_nothing(monkeypatch):
    model = toy.random("llama")
    task = _task(model)
    words = torch.tensor([1, 2])
    alone = contrast(model, direct(model), task, words)
    pad = torch.zeros(5, 3, dtype=torch.long)
    padded = replace(
        task, clean=torch.cat([pad, task.clean], 1), mask=torch.cat([pad, torch.ones_like(task.clean)], 1),
        positions={"end": task.positions["end"] + 3},
    )  # fmt: skip
    monkeypatch.setattr("interp.lenses.contrast._TOKENS", 24)
    together = contrast(model, direct(model), padded, words)
    # Rotary positions are counted without padding; the rest is rounding in float32.
    assert (alone.table["value"] - together.table["value"]).abs().max() < 2e-5


def test_bad_input():
    model, other = toy.random("llama"), toy.random("gpt2")
    task, lens, words = _task(model), direct(model), torch.tensor([1])
    for change, message in (
        ({"lens": direct(other)}, "not of"),
        ({"position": "subject"}, "no position 'subject', only end"),
        ({"first": torch.tensor([model.d_vocab])}, "another tokenizer"),
        ({"first": words[:0]}, "at least one token id"),
        ({"second": torch.ones(2, 1, dtype=torch.long)}, "words of 2 prompts were given for 5"),
    ):
        options = {"lens": lens, "first": words, "second": None, "position": "end"} | change
        with pytest.raises(ValueError, match=message):
            contrast(model, options["lens"], task, options["first"], options["second"], position=options["position"])
