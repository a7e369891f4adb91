"""Does a model that was just loaded do what the methods rely on?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interp.models.hooks import run
from interp.models.model import Model

#: Length of the check prompt. Its token ids are spread over the vocabulary, so no tokenizer is needed.
_N_TOKENS = 12


class ModelCheckError(RuntimeError):
    """A loaded model does not behave as the methods need it to."""


def _tokens(d_vocab: int, device: torch.device) -> Tensor:
    return ((torch.arange(_N_TOKENS, device=device) * 7919 + 5) % d_vocab)[None]


def reference(module: nn.Module, device: torch.device) -> Tensor:
    """Log-probabilities of the original module on the check prompt, before it is wrapped or processed.

    Args:
        module: a Hugging Face causal language model.
        device: where to run it.

    Returns:
        Log-probabilities `[pos d_vocab]` in float32. Cost: one forward pass of 12 tokens.
    """
    with torch.no_grad():
        logits = module.to(device)(_tokens(module.config.get_text_config().vocab_size, device)).logits
    return logits[0].float().log_softmax(-1)


def self_check(model: Model, raw_log_probs: Tensor | None = None) -> dict[str, float]:
    """Check a model, and raise with the name of what failed.

    Args:
        model: a decoder or encoder as `load` made it.
        raw_log_probs: `reference` of the same weights, to compare with.

    Returns:
        {check: largest deviation}: "attention rows sum to 1", "hook_z moves the output", "parts sum to the residual
        stream", and "log-probabilities equal the original's" when a reference was given.

    Raises:
        ModelCheckError: naming the first failed check, its deviation and its tolerance.

    Cost: two forward passes of 12 tokens; 0.5 s of CPU for the default model.
    """
    last = model.n_layers - 1
    tokens = _tokens(model.d_vocab or model.bridge.cfg.d_vocab, model.device)
    mixers = [f"blocks.{layer}.hook_attn_out" for layer in range(model.n_layers)]
    mixers += [f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers)]
    middle = model.n_layers // 2
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in {0, middle, last}]
    ends = ["blocks.0.hook_resid_pre", f"blocks.{last}.hook_resid_post"]
    plain = run(model, tokens, capture=[*mixers, *patterns, *ends])
    measured: dict[str, float] = {}
    # bfloat16 has 8 bits of mantissa: its sums of tens of terms are good to a per cent or two, float32's to 1e-4.
    exact = model.dtype in (torch.float32, torch.float64)

    rows = max(float((plain.cache[name].float().sum(-1) - 1).abs().max()) for name in patterns)
    _verdict(model, measured, "attention rows sum to 1", rows, 1e-4 if exact else 2e-2)

    moved = run(model, tokens, hooks=[(f"blocks.{middle}.attn.hook_z", lambda z, hook: z + 1)]).logits
    shift = float((moved.float() - plain.logits.float()).abs().max())
    if not shift > 1e-6:
        raise ModelCheckError(
            f"{model.name}: adding 1 to blocks.{middle}.attn.hook_z moved no output (largest change {shift:.1e}). "
            "Hooks on this model do not reach its computation, so no intervention on it can be trusted."
        )
    measured["hook_z moves the output"] = shift

    if model.causal:  # encoders normalise after each residual add: their stream is not a plain sum
        total = sum((plain.cache[name].float() for name in mixers), plain.cache[ends[0]].float())
        stream = plain.cache[ends[1]].float()
        relative = float((total - stream).norm() / stream.norm())
        _verdict(model, measured, "parts sum to the residual stream", relative, 1e-4 if exact else 2e-2)

    if raw_log_probs is not None:
        found = plain.logits[0].float().log_softmax(-1)
        likely = raw_log_probs > -20  # below e^-20 a log-probability is rounding noise
        gap = float((found - raw_log_probs.to(found.device))[likely].abs().max())
        _verdict(
            model, measured, f"{model.weights} log-probabilities equal the original's", gap, 1e-4 if exact else 0.5
        )
    return measured


def require_live(model: Model, name: str) -> None:
    """Raise unless editing a hook's activation changes the model's output.

    A hook can fire on a copy: TransformerBridge 3.9 shows OPT's attention pattern, but computes on with its own.

    Args:
        model: a loaded model.
        name: the hook to be edited.

    Raises:
        ModelCheckError: the output stays the same to the last bit.

    Cost: two forward passes of 12 tokens.
    """
    tokens = _tokens(model.d_vocab or model.bridge.cfg.d_vocab, model.device)
    # Reversed along its last axis: another activation of the same size, for a pattern still rows that sum to 1.
    edited = run(model, tokens, hooks=[(name, lambda activation, hook: activation.flip(-1))]).logits
    if torch.equal(edited, run(model, tokens).logits):
        raise ModelCheckError(
            f"{model.name}: editing {name!r} does not change the output. The bridge shows this activation on this "
            "architecture but does not compute with it, so no intervention on it can be trusted."
        )


def _verdict(model: Model, measured: dict[str, float], what: str, deviation: float, tolerance: float) -> None:
    measured[what] = deviation
    if not deviation <= tolerance:  # also true for NaN
        raise ModelCheckError(
            f"{model.name} failed its self-check: {what}: off by {deviation:.2e}, tolerance {tolerance:.0e} "
            f"({model.weights} weights, {model.dtype}, {model.device}). "
            + (
                'Try weights="raw".'
                if model.weights == "processed"
                else "The architecture is not wrapped faithfully: please report it."
            )
        )
