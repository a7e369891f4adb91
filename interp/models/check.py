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
        ModelCheckError: naming the first failed check, its deviation and its tolerance; or, when an activation is NaN
            or infinite, the first such hook and the weights that hold such values.

    Cost: two forward passes of 12 tokens; 0.5 s of CPU for the default model.
    """
    last = model.n_layers - 1
    tokens = _tokens(model.d_vocab or model.bridge.cfg.d_vocab, model.device)
    writers = ["hook_attn_out"] if getattr(model.bridge.cfg, "attn_only", False) else ["hook_attn_out", "hook_mlp_out"]
    mixers = [f"blocks.{layer}.{writer}" for layer in range(model.n_layers) for writer in writers]
    middle = model.n_layers // 2
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in {0, middle, last}]
    ends = ["blocks.0.hook_resid_pre", f"blocks.{last}.hook_resid_post"]
    plain = run(model, tokens, capture=[*mixers, *patterns, *ends])
    _require_finite(model, {name: plain.cache[name] for name in (ends[0], *mixers, ends[1])} | {"output": plain.logits})
    measured: dict[str, float] = {}
    # bfloat16 has 8 bits of mantissa: its sums of tens of terms are good to a per cent or two, float32's to 1e-4.
    exact = model.dtype in (torch.float32, torch.float64)

    rows = float(torch.stack([(plain.cache[name].float().sum(-1) - 1).abs().max() for name in patterns]).max())
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
        # Against the largest part: a massive entry that is written and erased again leaves its rounding behind.
        largest = torch.stack([plain.cache[name].float().norm() for name in mixers]).max()
        relative = float((total - stream).norm() / torch.maximum(largest, stream.norm()))
        _verdict(model, measured, "parts sum to the residual stream", relative, 1e-4 if exact else 2e-2)

    if raw_log_probs is not None:
        found, given = plain.logits[0].float().log_softmax(-1), raw_log_probs.to(plain.logits.device)
        if exact:
            likely = ~(given < -20)  # below e^-20 a log-probability is rounding noise; NaN must count
            gap = float((found - given)[likely].abs().max())
        else:
            # The largest of half a million rounded numbers says nothing: in bfloat16 it is 1 nat where all is well.
            gap = float((given.exp() * (given - found)).sum(-1).mean())
        what = f"{model.weights} log-probabilities equal the original's" + ("" if exact else " (mean divergence)")
        _verdict(model, measured, what, gap, 1e-4 if exact else 0.05)
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


def _require_finite(model: Model, activations: dict[str, Tensor]) -> None:
    broken = next((name for name, activation in activations.items() if not activation.isfinite().all()), None)
    if broken is None:
        return
    weights = [
        name.replace("._original_component", "")
        for name, weight in model.bridge.named_parameters()
        if not weight.isfinite().all()
    ]
    because = (
        f"{len(weights)} of its weights hold such values: {', '.join(weights[:3])}. Download or train it again."
        if weights
        else f"its weights are finite, so {model.dtype} overflows: load it with dtype=torch.float32."
    )
    raise ModelCheckError(
        f"{model.name} failed its self-check: activations are finite: {broken} is the first that is NaN or infinite; "
        f"{because}"
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
