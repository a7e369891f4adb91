"""How is a small transformer trained on tokens? Seeded, resumed without a difference, measured on the way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from interp.core.result import Result
from interp.dynamics._run import IGNORED, Batch, Draw, Run
from interp.models import fingerprint, sources

__all__ = ["IGNORED", "Batch", "Draw", "Trained", "build", "config", "train"]


class Trained(NamedTuple):
    """What `train` returns: the module, in evaluation mode, and the Result with its loss and accuracy by step."""

    module: nn.Module
    history: Result


def config(
    architecture: str = "llama",
    *,
    d_vocab: int,
    n_ctx: int,
    n_layers: int = 2,
    n_heads: int = 4,
    d_model: int = 64,
    d_mlp: int | None = None,
    **options: Any,
) -> Any:
    """The Hugging Face configuration of a small transformer, from its sizes.

    Weights start at N(0, 1/d_model), so that queries, keys and values start at the scale of what they read. With
    Hugging Face's own 0.02, attention of a narrow model starts uniform and stays so for thousands of steps. No dropout.

    Args:
        architecture: "llama" (rotary positions, RMSNorm, gated MLP) or "gpt2" (learned positions, LayerNorm, GELU).
        d_vocab: number of tokens; ids 0 and 1 are the beginning and end of text, as in `toy.tokenizer`.
        n_ctx: longest prompt.
        n_layers: number of blocks.
        n_heads: heads a block.
        d_model: width of the residual stream, a multiple of n_heads.
        d_mlp: width of the MLP; None for 2 d_model (llama, which has three matrices) or 4 d_model (gpt2).
        **options: more fields of the configuration class, in its names, for example num_key_value_heads=1.

    Returns:
        A LlamaConfig or GPT2Config, for `build` and `train`.

    Raises:
        ValueError: an unknown architecture, or heads that do not divide d_model.

    Example:
        >>> config("llama", d_vocab=30, n_ctx=8, d_model=16, tie_word_embeddings=True).num_hidden_layers
        2
    """
    import transformers

    if d_model % n_heads:
        raise ValueError(f"d_model={d_model} cannot be divided among n_heads={n_heads} heads.")
    # use_cache: training would put together keys and values that nothing reads.
    fields: dict[str, Any] = {
        "vocab_size": d_vocab, "bos_token_id": 0, "eos_token_id": 1, "use_cache": False,
        "initializer_range": d_model**-0.5,
    }  # fmt: skip
    if architecture == "llama":
        fields |= {
            "num_hidden_layers": n_layers, "num_attention_heads": n_heads, "num_key_value_heads": n_heads,
            "hidden_size": d_model, "intermediate_size": d_mlp or 2 * d_model, "max_position_embeddings": n_ctx,
        }  # fmt: skip
        return transformers.LlamaConfig(**(fields | options))
    if architecture == "gpt2":
        fields |= {
            "n_layer": n_layers, "n_head": n_heads, "n_embd": d_model, "n_inner": d_mlp or 4 * d_model,
            "n_positions": n_ctx, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
        return transformers.GPT2Config(**(fields | options))
    raise ValueError(f'architecture={architecture!r}: use "llama" or "gpt2", or give `train` a module of your own.')


def build(configuration: Any, *, seed: int = 0) -> nn.Module:
    """A Hugging Face causal language model with random weights.

    Args:
        configuration: of `config`, or any that AutoModelForCausalLM knows.
        seed: seed of the weights, drawn on the CPU.

    Returns:
        The module, in float32. The global random state is left as it was.

    Example:
        >>> module = build(config("gpt2", d_vocab=30, n_ctx=8), seed=1)
        >>> sum(weight.numel() for weight in module.parameters())
        102528
    """
    import transformers

    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.default_generator.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(configuration, attn_implementation="sdpa").float()


def train(
    start: Any,
    batch: Draw,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    weight_decay: float = 0.01,
    batch_size: int = 64,
    held_out: Batch | None = None,
    stop_at: float | None = None,
    every: int = 100,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    folder: str | os.PathLike[str] | None = None,
) -> Trained:
    """Train a transformer to predict tokens.

    Each step draws prompts, takes the cross-entropy of the logits at the positions that have a target, clips the norm
    of the gradient to 1, and updates with AdamW (betas 0.9 and 0.98; matrices and embeddings decay, vectors do not).
    The learning rate rises linearly over `warmup` steps and then follows a cosine down to a tenth.

    Every step has a generator of its own, made from the seed and the step. So a run that was stopped and goes on equals
    one that was not, bit for bit on the CPU (of one machine, with one number of threads), and so do two runs of one
    seed. The global random state is left as it was, even where the module has dropout.

    What came out is ready for hooks with `interp.load(trained.module, tokenizer=tokenizer)`.

    Args:
        start: a configuration, which is built with `seed`; or a module, which is trained in place. It maps tokens
            `[batch pos]` to logits `[batch pos d_vocab]`, or to an object that has them as `.logits`. Parameters that
            need no gradient stay as they are.
        batch: draws training prompts, `batch(generator, n) -> (tokens, targets)`, both `[n pos]` on the CPU.
            `targets` holds the id to be predicted after each position, and -100 where none counts.
        steps: most updates.
        learning_rate: its peak.
        warmup: updates until the peak.
        weight_decay: of AdamW.
        batch_size: prompts a step.
        held_out: (tokens, targets) to measure on; None draws 1,024 prompts with `batch` and a generator that no step
            uses. Where there are few different prompts, give some that `batch` never draws.
        stop_at: stop at the first measurement whose held-out accuracy is at least this; None for no early stop.
        every: measure on the held-out prompts, and store a checkpoint, each time after so many steps.
        seed: of the weights, if they are drawn here, and of the batches.
        device: where to train; None for the CPU.
        dtype: of the weights and of AdamW's averages. In bfloat16 an update below 1/256 of a weight is lost.
        folder: for `checkpoint.safetensors`, which holds weights, optimiser state and history, and is replaced as a
            whole: a kill at any moment leaves the old one or the new one. A run goes on from the one that is
            there, or is done at once if it was finished. None for no checkpoints.

    Returns:
        `Trained(module, history)`. The history's columns are `step`, `metric` and `value`. "loss" and "accuracy" of
        step s are those of its batch before its update, s from 1. "held-out loss" and "held-out accuracy" of step s are
        measured after s updates: at 0, at each multiple of `every` and at the end. An accuracy is the fraction
        of targets that have the largest logit of all tokens. `meta` holds the settings, the numbers of
        parameters and of steps done.

    Raises:
        ValueError: prompts and targets of unequal shapes, ids outside the vocabulary, prompts without a target or
            longer than the context, nothing to train, or a checkpoint of other settings, other data or another start.
        FloatingPointError: the loss is no longer finite; the message names the step.

    Cost: steps x 6 x parameters x batch x pos FLOPs, and a third of it for a measurement of as many prompts; memory of
        four times the weights.

    Example:
        >>> def repeat(generator, n):  # the answer is the first token
        ...     tokens = torch.randint(2, 8, (n, 3), generator=generator)
        ...     return tokens, torch.cat([torch.full((n, 2), IGNORED), tokens[:, :1]], dim=1)
        >>> sizes = config(d_vocab=8, n_ctx=3, n_layers=1, n_heads=2, d_model=16)
        >>> trained = train(sizes, repeat, steps=300, learning_rate=1e-2, stop_at=0.99, every=50)
        >>> trained.history.meta["steps_done"]
        100
    """
    where = torch.device(device or "cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device="{where}", but this torch ({torch.__version__}) sees no CUDA GPU: use device="cpu".')
    if min(steps, every, batch_size) < 1 or warmup < 0:
        raise ValueError(
            f"steps={steps}, every={every}, batch_size={batch_size}, warmup={warmup}: the first three are at least 1, "
            "the last at least 0."
        )
    module = start if isinstance(start, nn.Module) else build(start, seed=seed)
    module = sources.cast(module, dtype).to(where)
    settings = {
        "steps": steps, "learning_rate": learning_rate, "warmup": warmup, "weight_decay": weight_decay,
        "batch_size": batch_size, "stop_at": stop_at, "every": every, "seed": seed, "device": where.type,
        "dtype": str(dtype).removeprefix("torch."), "start": fingerprint.of_module(module),
    }  # fmt: skip
    file = None if folder is None else Path(folder) / "checkpoint.safetensors"
    # Dropout, and whatever else a module draws, comes from the global generators: they are seeded step by step.
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        run = Run(module, batch, held_out, settings, file)
        with tqdm(total=steps, initial=run.step, unit="step", desc="training", leave=False) as bar:
            for accuracy in run:
                bar.update(run.step - bar.n)
                bar.set_postfix_str(f"held-out accuracy {accuracy:.1%}")
    return Trained(module.eval(), run.history())
