"""Does the self-check pass what works, and name what was broken?"""

from __future__ import annotations

import importlib
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from interp.models import Model, ModelCheckError, load, self_check, toy
from interp.models.check import reference, require_live

CHECKS = {"attention rows sum to 1", "hook_z moves the output", "parts sum to the residual stream"}


def cpu() -> torch.device:
    return torch.device("cpu")


def broken(point: str, edit: Any, architecture: str = "llama") -> Model:
    """A model with a hook that a bridge which wraps wrongly might have."""
    model = toy.random(architecture)
    model.hook_point(point).add_hook(edit)
    return model


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_every_architecture_passes_by_a_wide_margin(architecture: str) -> None:
    module = toy.random_module(architecture)
    model = toy.random(architecture)
    measured = self_check(model, reference(module, cpu()))
    last = "processed log-probabilities equal the original's"
    assert set(measured) == CHECKS | {last}
    assert measured["attention rows sum to 1"] < 1e-6
    assert measured["parts sum to the residual stream"] < 1e-5
    assert measured[last] < 5e-5
    assert measured["hook_z moves the output"] > 0.1


def test_the_default_model_passes_in_a_second(smol: Model) -> None:
    started = time.process_time()
    measured = self_check(smol)
    spent = time.process_time() - started
    assert set(measured) == CHECKS
    assert measured["parts sum to the residual stream"] < 1e-5
    assert spent < 3  # 0.3 s on an idle machine; the run-time shape checks and a busy machine cost the rest


def test_reference_is_the_modules_own_log_probabilities() -> None:
    module = toy.random_module("gpt2")
    tokens = torch.tensor([[(7919 * i + 5) % 64 for i in range(12)]])
    with torch.no_grad():
        expected = torch.log(torch.softmax(module(tokens).logits[0], -1))
    # float32: the logarithm of a softmax against log_softmax
    torch.testing.assert_close(reference(module, cpu()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_that_does_not_sum_to_one(layer: int) -> None:
    model = broken(f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pattern * 1.001)
    with pytest.raises(ModelCheckError, match=r"attention rows sum to 1: off by 1.00e-03, tolerance 1e-04 \(processed"):
        self_check(model)


def test_hooks_that_reach_nothing() -> None:
    # Attention that is shown but not used: what it writes is thrown away.
    model = broken("blocks.1.hook_attn_out", lambda out, hook: torch.zeros_like(out))
    with pytest.raises(ModelCheckError, match=r"adding 1 to blocks.1.attn.hook_z moved no output \(largest change 0.0"):
        self_check(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_parts_that_do_not_sum_to_the_stream(architecture: str) -> None:
    model = broken("blocks.1.hook_resid_post", lambda stream, hook: stream * 1.001, architecture)
    with pytest.raises(ModelCheckError, match="parts sum to the residual stream: off by .*e-0., tolerance 1e-04"):
        self_check(model)


def test_other_log_probabilities_than_the_originals() -> None:
    model, given = toy.random("llama"), reference(toy.random_module("llama"), cpu())
    self_check(model, given)
    off = given.clone()
    off[3, 10] += 2e-4
    with pytest.raises(
        ModelCheckError, match='processed log-probabilities .*(1.9|2.0).e-04, tolerance 1e-04.*weights="raw"'
    ):
        self_check(model, off)
    raw = toy.random("llama", weights="raw")
    with pytest.raises(ModelCheckError, match="raw log-probabilities equal the original's.*please report it"):
        self_check(raw, reference(toy.random_module("llama", seed=1), cpu()))
    off = given.clone()
    off[0, 0] = float("nan")
    with pytest.raises(ModelCheckError, match="off by nan"):
        self_check(model, off)


def test_what_is_less_likely_than_rounding_noise_does_not_count() -> None:
    model, given = toy.random("llama"), reference(toy.random_module("llama"), cpu())
    given[0, given[0].argmin()] = -25.0
    self_check(model, given)


def test_load_runs_the_check_and_a_model_processed_wrongly_does_not_get_out(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = importlib.import_module("interp.models.load")
    whole = loading.boot

    def wrong(*arguments: Any, **options: Any) -> Any:
        bridge = whole(*arguments, **options)
        with torch.no_grad():
            bridge.unembed.weight[5] *= 1.01
        return bridge

    monkeypatch.setattr(loading, "boot", wrong)
    with pytest.raises(ModelCheckError, match="LlamaForCausalLM failed its self-check: processed log-probabilities"):
        toy.random("llama")


@pytest.mark.parametrize(
    ("parameter", "hook", "shown"),
    [
        ("model.layers.2.mlp.down_proj.weight", "blocks.2.hook_mlp_out", "layers.2.mlp.down_proj.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blocks.0.hook_attn_out", "layers.0.self_attn.o_proj.weight"),
        ("model.layers.1.mlp.gate_proj.weight", "blocks.1.hook_mlp_out", "layers.1.mlp.gate_proj.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", ["raw", "processed"])
def test_nan_and_infinite_weights_are_named_with_the_place(
    parameter: str, hook: str, shown: str, value: float, weights: Any
) -> None:
    module = toy.random_module("llama")
    with torch.no_grad():
        module.get_parameter(parameter)[1, 3] = value
    with pytest.raises(ModelCheckError) as caught:
        load(module, tokenizer=toy.tokenizer(), weights=weights)
    text = str(caught.value)
    assert f"activations are finite: {hook} is the first that is NaN or infinite" in text
    assert "1 of its weights hold such values" in text and shown in text


def test_a_type_that_overflows_is_named() -> None:
    module = toy.random_module("gpt2")
    with torch.no_grad():
        module.transformer.h[1].mlp.c_proj.weight[:, 3] = 60000.0
    load(module, tokenizer=toy.tokenizer(), weights="raw")  # in float32 it is large, and fine
    with pytest.raises(
        ModelCheckError, match=r"blocks.1.hook_mlp_out is .*its weights are finite, so torch.float16 over"
    ):
        load(module, tokenizer=toy.tokenizer(), weights="raw", dtype="float16")


def test_half_precision_is_checked_too() -> None:
    module = toy.random_module("llama")
    model = load(module, tokenizer=toy.tokenizer(), dtype="bfloat16")
    measured = self_check(model, reference(module, cpu()))
    # 8 bits of mantissa: not exact, and far from another model
    assert 1e-7 < abs(measured["processed log-probabilities equal the original's (mean divergence)"]) < 0.02
    with pytest.raises(ModelCheckError, match="mean divergence"):
        self_check(model, reference(toy.random_module("llama", seed=1), cpu()))
    hooked = load(module, tokenizer=toy.tokenizer(), dtype="bfloat16")
    hooked.hook_point("blocks.1.hook_resid_post").add_hook(lambda stream, hook: stream * 1.1)
    with pytest.raises(ModelCheckError, match="parts sum to the residual stream"):
        self_check(hooked)


def test_an_encoders_stream_is_no_plain_sum_and_is_not_asked_to_be(bert_folder: Any) -> None:
    model = load(bert_folder)
    assert set(self_check(model)) == CHECKS - {"parts sum to the residual stream"}
    with pytest.raises(ModelCheckError, match="parts sum"):
        self_check(replace(model, causal=True))


def test_a_hook_on_a_copy_is_not_live() -> None:
    for architecture in toy.ARCHITECTURES:
        model = toy.random(architecture)
        require_live(model, "blocks.1.attn.hook_z")
        require_live(model, "blocks.1.hook_resid_post")
    dead = toy.random("opt")
    with pytest.raises(ModelCheckError, match="editing 'blocks.1.attn.hook_pattern' does not change the output"):
        require_live(dead, "blocks.1.attn.hook_pattern")
    require_live(toy.random("llama"), "blocks.1.attn.hook_pattern")


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_a_module_with_fused_attention_gets_a_pattern(architecture: str) -> None:
    module = toy.random_module(architecture)
    module.set_attn_implementation("sdpa")  # what from_pretrained gives; it computes no pattern
    assert set(self_check(load(module, tokenizer=toy.tokenizer(), weights="raw"))) == CHECKS
