"""The cache: what is in it is what the model computes; whole or not at all; never another text's."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.lenses import cached as module
from interp.lenses._divergence import divergence, targets
from interp.lenses._final import final_norm
from interp.lenses._output import output
from interp.lenses.cached import cache
from interp.models import Model, toy
from interp.models.hooks import run
from interp.tasks.task import Task


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("weights", ["raw", "processed"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma", "gemma2"])
def test_what_is_cached_is_what_the_model_computes(architecture: str, weights: Any) -> None:
    model = toy.random(architecture, weights=weights)
    tokens = toy.random_tokens(model, 3, 12)
    found = cache(model, tokens, skip=2, batch_size=2, dtype="float32")
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    seen = run(model, tokens, capture=["blocks.1.attn.hook_z", last])
    out, p = output(model), seen.logits[:, 2:].flatten(0, 1).log_softmax(-1)
    # float32: sums of 32 to 64 terms of order 1
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(found.activation(1), seen.cache["blocks.1.attn.hook_z"][:, 2:].flatten(0, 1), **close)
    ours = found.r @ out.unembed + (0 if out.bias is None else out.bias)
    torch.testing.assert_close(_capped(ours, out.cap).log_softmax(-1), p, **close)
    torch.testing.assert_close(found.mean, p.exp() @ out.unembed.T, **close)
    torch.testing.assert_close(found.entropy, -(p.exp() * p).sum(-1), **close)
    torch.testing.assert_close(found.total, p.exp().sum(0), **close)
    stream, norm = seen.cache[last][:, 2:].flatten(0, 1), final_norm(model)
    torch.testing.assert_close(found.scale[:, None] * norm.linear(stream) + norm.bias, found.r, **close)
    if out.cap is None:  # the lens that reads the last layer as the model does
        b = out.bias
        extra = None if b is None else targets(out.unembed, b, found.r, extra=b[:, None]).extra[:, 0]
        assert divergence(found.r, out.unembed, found.targets(), bias=b, expected_bias=extra).abs().max() < 1e-4


def test_layer_norm_is_taken_apart_as_its_formula_says() -> None:
    model = toy.random("gpt2", weights="raw")
    norm, inner = final_norm(model), model.bridge.ln_final.original_component
    assert norm.centres
    torch.testing.assert_close(norm.gain, inner.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.bias, inner.bias.detach())
    x = 3 + 2 * torch.randn(5, model.d_model)
    sigma = (x.var(-1, unbiased=False) + inner.eps).sqrt()
    torch.testing.assert_close(norm.inverse_scale(x, inner(x)), 1 / sigma, atol=1e-6, rtol=1e-4)
    assert not final_norm(toy.random("llama", weights="raw")).centres


def test_each_token_knows_its_place_and_the_next_one() -> None:
    model = toy.random("llama")
    tokens = toy.random_tokens(model, 2, 6)
    tokens[0, 0] = model.tokenizer.bos_token_id
    found = cache(model, tokens, skip=0)
    assert found.position.tolist() == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]  # without the BOS
    assert found.document.tolist() == [0] * 5 + [1] * 6
    assert found.tokens.tolist() == tokens.flatten()[1:].tolist()
    assert found.next.tolist() == [*tokens[0, 2:].tolist(), -1, *tokens[1, 1:].tolist(), -1]


def test_padding_is_no_text() -> None:
    model = toy.random("llama")
    task = Task.from_pairs(
        model, "own", ["w2 w3 w4 w5", "w6 w7"], ["w2 w3 w4 w6", "w6 w8"], [" w5", " w6"], [" w7", " w8"]
    )
    both, short = cache(model, task, skip=1), cache(model, torch.tensor([[6, 7]]), skip=1)
    assert both.tokens.tolist() == [3, 4, 5, 7]
    assert both.position.tolist() == [1, 2, 3, 1]
    # float16 of activations, float32 of a padded pass
    torch.testing.assert_close(both.activation(2)[3:], short.activation(2), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(both.r[3:], short.r, atol=1e-4, rtol=1e-4)


def test_streams_can_be_cached_too_and_batches_do_not_matter() -> None:
    model = toy.random("qwen2")
    tokens = toy.random_tokens(model, 5, 9)
    found = [cache(model, tokens, site="resid", layers=[1], skip=3, batch_size=n, folder=None) for n in (5,)]
    stream = run(model, tokens, capture=["blocks.1.hook_resid_pre"]).cache["blocks.1.hook_resid_pre"][:, 3:]
    torch.testing.assert_close(found[0].activation(1), stream.flatten(0, 1), atol=2e-3, rtol=1e-3)  # float16: 11 bits
    torch.testing.assert_close(found[0].activation(1, torch.tensor([4, 2])), found[0].activation(1)[[4, 2]])
    with pytest.raises(ValueError, match=r"layer 0 was not cached, only \[1\]"):
        found[0].activation(0)
    with pytest.raises(ValueError, match='site="z"'):
        found[0].require(model, site="z")


def test_the_same_text_is_read_again_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.random("llama")
    tokens = toy.random_tokens(model, 2, 12)
    first = cache(model, tokens, folder=tmp_path / "a")
    monkeypatch.setattr(module, "run", None)
    again = cache(model, tokens, folder=tmp_path / "a")
    assert torch.equal(first.activation(0), again.activation(0)) and torch.equal(first.total, again.total)
    assert first.fingerprint == again.fingerprint
    with pytest.raises(ValueError, match="cached with text="):
        cache(model, tokens.flip(1), folder=tmp_path / "a")
    with pytest.raises(ValueError, match="cached with model_fingerprint="):
        cache(toy.random("llama", seed=1), tokens, folder=tmp_path / "a")
    with pytest.raises(ValueError, match="cached with skip=8, not 3"):
        cache(model, tokens, folder=tmp_path / "a", skip=3)
    (tmp_path / "a" / "layer_1.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="not whole"):
        cache(model, tokens, folder=tmp_path / "a")
    with pytest.raises(ValueError, match="holds other files"):
        cache(model, tokens, folder=tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = toy.random("gpt2")
    found = cache(model, toy.random_tokens(model, 2, 12))
    with pytest.raises(ValueError, match="cache the text with this model"):
        found.require(toy.random("gpt2", weights="raw"))
    found.require(model, site="z")


def test_another_tokenizer_is_refused(smol: Model) -> None:
    text = interp.tasks.corpus(smol, n_tokens=200).windows(50)
    with pytest.raises(ValueError, match="another vocabulary"):
        cache(toy.random("llama"), text)
    with pytest.raises(ValueError, match="another tokenizer"):
        cache(toy.random("llama"), text.tokens)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.random("llama")
    tokens = toy.random_tokens(model, 2, 12)
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(100))
        with pytest.raises(OSError, match=r"0 MB free, and 8 tokens of 3 layers take 0 MB: give folder="):
            cache(model, tokens, folder=tmp_path / "a" / "b")
    assert not list((tmp_path / "a").iterdir())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", full)
        with pytest.raises(OSError, match="No space left on device.*Nothing is left"):
            cache(model, tokens, folder=tmp_path / "a" / "b")
    assert not list((tmp_path / "a").iterdir())
    assert cache(model, tokens, folder=tmp_path / "a" / "b").n_tokens == 8


def test_what_float16_cannot_hold_is_said(tmp_path: Path) -> None:
    model = toy.inflated(layer=0, token=0, value=1e5)
    tokens = torch.zeros(2, 12, dtype=torch.long)
    tokens[:, 1:] = toy.random_tokens(model, 2, 11)
    model = replace(model, tokenizer=None)  # whose BOS would be left out
    with pytest.raises(ValueError, match='float16 cannot hold: cache.*"bfloat16"'):
        cache(model, tokens, site="resid", layers=[1], skip=0, folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    found = cache(model, tokens, site="resid", layers=[1], skip=0, dtype="bfloat16", folder=tmp_path / "a")
    assert found.activation(1).abs().max() > 65_504


def test_a_bfloat16_model_is_read_in_its_own_precision() -> None:
    module = toy.random_module("llama").bfloat16()
    model = interp.load(module, tokenizer=toy.tokenizer(), weights="raw", dtype="bfloat16")
    tokens = toy.random_tokens(model, 2, 12)
    found = cache(model, tokens)
    p = model(tokens)[:, 8:].flatten(0, 1).double().log_softmax(-1)
    # The model's own logits are rounded to 8 bits, r U is not.
    torch.testing.assert_close(found.entropy.double(), -(p.exp() * p).sum(-1), atol=0.05, rtol=0.02)


def test_options_that_leave_nothing_are_refused() -> None:
    model = toy.random("llama")
    tokens = toy.random_tokens(model, 2, 8)
    with pytest.raises(ValueError, match="skip=8: give longer windows"):
        cache(model, tokens)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        cache(model, tokens, layers=[3], skip=1)
    with pytest.raises(ValueError, match=r"ids \[window pos\]"):
        cache(model, tokens[0], skip=1)


def test_the_default_model_takes_less_than_40_kb_a_token(smol: Model, tmp_path: Path) -> None:
    text = interp.tasks.corpus(smol, n_tokens=256).windows(128)
    found = cache(smol, text, folder=tmp_path / "a")
    size = sum(file.stat().st_size for file in found.folder.iterdir() if file.name != "total.bin")
    assert size / found.n_tokens < 40_000
    out = output(smol)
    # r and E_p[U] are float32: 576 products of order 1 to 10 are summed and cancel
    assert divergence(found.r[:64], out.unembed, found.targets(slice(0, 64))).abs().max() < 2e-4
