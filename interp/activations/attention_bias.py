"""Does a model that is given an explicit attention bias still grow massive activations?

A massive activation makes the keys and values of its token nearly constant, so attention to that token adds nearly the
same vector to every query: an implicit bias. The paper gives each head an explicit one, a learned key k' and value v',
and trains GPT-2 with it, with a learned sink token, and with neither. Here the same three arms are trained small.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from interp.activations._small_gpt import ARMS, Seen, SmallGPT, attention_pattern, attention_with_bias, bias_share
from interp.core.places import cache_folder
from interp.core.registry import method
from interp.core.result import Result
from interp.tasks.task import Task

__all__ = ["ARMS", "SmallGPT", "attention_pattern", "attention_with_bias", "bias_share", "train_arms"]

#: The paper's criteria: an entry is massive above this magnitude ...
ABSOLUTE = 100.0
#: ... and at this many times the median magnitude of its layer.
RATIO = 1000.0
#: Windows of held-out text that each evaluation measures.
N_VALIDATION = 32

UNITS = {
    "validation loss": "nats per symbol",
    "largest |h|": "residual stream",
    "median |h|": "residual stream",
    "largest/median": "ratio",
    "massive entries": "entries per sequence",
    "largest |h| at position 0": "fraction of sequences",
    "attention mass on token 0": "fraction of attention",
    "attention mass on the sink": "fraction of attention",
    "attention mass on k'": "fraction of attention",
}


@method(name="Explicit attention biases, trained", paper="arXiv:2402.17762", notebook="massive_activations")
def train_arms(
    tokens: Task | Tensor,
    *,
    arms: Sequence[str] = ARMS,
    n_layers: int = 4,
    n_heads: int = 4,
    d_model: int = 64,
    context: int = 64,
    steps: int = 1200,
    batch: int = 32,
    learning_rate: float = 2e-3,
    seeds: Sequence[int] = (0,),
    evaluations: int = 10,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Train small GPT-2s with and without an explicit attention bias, and measure their activations on the way.

    Arms: "default" is GPT-2; "sink" has one learned embedding in front of the text, without a position, dropped before
    the head; "attn_bias" has k' and v' in each head, Attn = softmax(Q [K^T k'] / sqrt(d_head)) [V ; v'^T]. With one
    seed, arms start from the same weights and read the same batches. Nothing is promised about massive
    activations: in models this small they need not appear in any arm.

    The text: of a Task, the UTF-8 bytes of its prompts, which keep the vocabulary near 100 symbols and
    the embedding small; of a tensor, the ids themselves. Either way symbols are renumbered to those that occur.
    The last tenth is held out for validation.

    Args:
        tokens: a Task (for example `interp.tasks.text`), or token ids `[n_tokens]`.
        arms: which arms to train, from `ARMS`.
        n_layers: number of blocks.
        n_heads: heads a block.
        d_model: width of the residual stream.
        context: tokens in a training window.
        steps: optimiser steps an arm and seed.
        batch: windows a step.
        learning_rate: peak of the schedule: linear warm-up over a tenth of the steps, then a cosine to a tenth.
        seeds: one training run for each, a label in column `target`.
        evaluations: how often to measure, evenly over the steps, and once before the first.
        device: where to train.
        dtype: of weights and optimiser.
        checkpoint: folder for the state of unfinished runs, one safetensors file an arm and seed, written at each
            evaluation and kept; None for one in the cache folder, removed when all runs are done. A run that was
            stopped goes on from there, and on the CPU ends with the weights of an uninterrupted one, bit for bit.
        progress: show the progress bar.

    Returns:
        Result; `component` is the arm, `target` the seed ("seed 0"), `step` the steps done, `layer` the block whose
        output or attention is measured (missing for the loss), `metric` one of `UNITS`, which `meta["units"]` repeats.
        Magnitudes and counts are means over 32 validation windows (fewer when the text is short) of each window's own;
        in the arm "sink" a window includes the sink, at position 0. Attention mass is a mean over windows, heads and
        the queries after token 0; attention spread evenly gives token 0 the mean of 1/2, 1/3 ... 1/context, which is
        0.06 for a context of 64.

    Raises:
        ValueError: for an arm that is not one of the three, heads that do not divide d_model, ids of a wrong shape, a
            text too short for the context, or a checkpoint of other settings.
        FloatingPointError: when training diverges; the message names the arm and step.

    Cost: arms x seeds x steps x about 6 x (12 n_layers d_model^2 + d_vocab d_model) x batch x context FLOPs. The
        defaults take about 50 s an arm on two idle CPU cores.

    Differs from the paper: about 0.2M parameters instead of 124M, bytes instead of BPE tokens, and millions of
        symbols instead of 25 billion; linear layers and norms have biases, as GPT-2's own.
    """
    ids, vocabulary = _symbols(tokens)
    shape = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "context": context}
    _check(arms, shape, len(ids), steps, evaluations)
    train, validation = _split(ids, context)
    settings = {
        **shape,
        "d_vocab": int(ids.max()) + 1,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "evaluations": evaluations,
        "device": torch.device(device).type,
        "dtype": str(dtype).removeprefix("torch."),
        "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "training" / digest if checkpoint is None else Path(checkpoint)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(arms) * len(seeds) * steps, unit="step", leave=False, disable=not progress) as bar:
        for arm in arms:
            for seed in seeds:
                bar.set_description(f"{arm}, seed {seed}")
                run = _Run(arm, int(seed), settings, folder / f"{arm}-seed{int(seed)}.safetensors", device, dtype)
                bar.update(run.step)
                for _ in run.train(train, validation):
                    bar.update()
                rows += run.rows
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
    table = pd.DataFrame(rows, columns=["component", "target", "step", "layer", "metric", "value"])
    return Result(
        "Explicit attention biases, trained",
        table.astype({"layer": "Int64", "value": float}),
        "by metric: see meta['units']",
        meta={
            **settings,
            "arms": list(arms),
            "seeds": [int(seed) for seed in seeds],
            "vocabulary": vocabulary,
            "task_fingerprint": tokens.fingerprint if isinstance(tokens, Task) else None,
            "n_symbols": len(ids),
            "n_validation_windows": len(validation),
            "units": {name: UNITS[name] for name in dict.fromkeys(table["metric"])},
            "torch": torch.__version__,
        },
    )


class _Run:
    """One arm and seed: model, optimiser, steps done and rows measured, which its checkpoint file holds too."""

    def __init__(
        self,
        arm: str,
        seed: int,
        settings: Mapping[str, Any],
        file: Path,
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.arm, self.seed, self.settings, self.file = arm, seed, settings, file
        shape = {name: settings[name] for name in ("d_vocab", "n_layers", "n_heads", "d_model", "context")}
        self.model = SmallGPT(arm, seed=seed, **shape).to(device, dtype)
        # As nanoGPT: matrices decay (k', v' and the sink among them), vectors do not.
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        if file.is_file():
            self._restore()

    def train(self, text: Tensor, validation: Tensor) -> Iterator[int]:
        """Train to the end, yielding after each step; measure and store on the way."""
        steps = self.settings["steps"]
        due = {round(part * steps / self.settings["evaluations"]) for part in range(self.settings["evaluations"] + 1)}
        if not self.rows:
            self._evaluate(validation)
        while self.step < steps:
            for group in self.optimiser.param_groups:
                group["lr"] = _learning_rate(self.step, steps, self.settings["learning_rate"])
            window = self._batch(text)
            loss = F.cross_entropy(self.model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
            self.optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.step += 1
            if self.step in due:
                self._evaluate(validation)
                self._store()
            yield self.step

    def _batch(self, text: Tensor) -> Tensor:
        # A generator per step: a resumed run needs no generator state, and every arm reads the same windows.
        context = self.settings["context"]
        starts = np.random.default_rng([self.seed, self.step]).integers(
            len(text) - context, size=self.settings["batch"]
        )
        windows = torch.as_tensor(starts)[:, None] + torch.arange(context + 1)
        return text[windows].to(next(self.model.parameters()).device)

    @torch.no_grad()
    def _evaluate(self, validation: Tensor) -> None:
        losses, layers = [], []
        for windows in validation.to(next(self.model.parameters()).device).split(self.settings["batch"]):
            seen: list[Seen] = []
            logits = self.model(windows[:, :-1], seen).float()
            losses.append(F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1))
            layers.append([_measure(self.arm, block) for block in seen])
        loss = torch.cat(losses).mean().item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"arm {self.arm!r}, seed {self.seed}: the loss is {loss} after step {self.step} of "
                f"{self.settings['steps']}: train with a learning_rate below {self.settings['learning_rate']}."
            )
        self._row(None, "validation loss", loss)
        for layer in range(self.settings["n_layers"]):
            for metric in layers[0][layer]:
                self._row(layer, metric, torch.cat([part[layer][metric] for part in layers]).mean().item())

    def _row(self, layer: int | None, metric: str, value: float) -> None:
        self.rows.append(
            {
                "component": self.arm,
                "target": f"seed {self.seed}",
                "step": self.step,
                "layer": layer,
                "metric": metric,
                "value": value,
            }
        )

    def _identity(self) -> str:
        return json.dumps({**self.settings, "arm": self.arm, "seed": self.seed}, sort_keys=True)

    def _store(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in state.items()}
        metadata = {"identity": self._identity(), "step": str(self.step), "rows": json.dumps(self.rows)}
        unfinished = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
            os.replace(unfinished, self.file)  # a kill at any moment leaves the old file or the new one
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            warnings.warn(
                f"the checkpoint {self.file} cannot be written ({error}): training goes on, but cannot be resumed "
                "if it stops. Give checkpoint= a folder with free space.",
                stacklevel=2,
            )

    def _restore(self) -> None:
        try:
            with safe_open(self.file, "pt") as stored:
                metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"the checkpoint {self.file} cannot be read ({error}): delete it to start again."
            ) from None
        theirs, ours = json.loads(metadata["identity"]), json.loads(self._identity())
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the checkpoint {self.file} was trained with {name}={theirs.get(name)!r}, not {value!r}: give "
                    "another folder, or delete the file to start again."
                )
        self.model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, index, *rest = name.split(".")
            if kind == "optimiser":
                state.setdefault(int(index), {})[rest[0]] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.rows = int(metadata["step"]), json.loads(metadata["rows"])


def _measure(arm: str, block: Seen) -> dict[str, Tensor]:
    """What one block shows, `[batch]` each."""
    size = block.resid_post.float().abs()
    flat = size.flatten(1)
    largest, median = flat.amax(1), flat.median(1).values
    massive = (flat > ABSOLUTE) & (flat >= RATIO * median[:, None])
    # In front of the text: the sink (a position, so a query too) or k' (a column only).
    columns = 0 if arm == "default" else 1
    queries = slice(2 if arm == "sink" else 1, None)  # the first token itself can look at little else
    mass = block.pattern[:, :, queries].float().mean((1, 2))
    measured = {
        "largest |h|": largest,
        "median |h|": median,
        "largest/median": largest / median,
        "massive entries": massive.sum(1).float(),
        "largest |h| at position 0": (flat.argmax(1) < size.shape[2]).float(),
        "attention mass on token 0": mass[:, columns],
    }
    if columns:
        measured["attention mass on the sink" if arm == "sink" else "attention mass on k'"] = mass[:, 0]
    return measured


def _learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _symbols(tokens: Task | Tensor) -> tuple[Tensor, str]:
    """The text as ids 0, 1, ... of the symbols that occur, `[n]`, and what the symbols are."""
    if isinstance(tokens, Task):
        raw = torch.frombuffer(bytearray("\n".join(tokens.prompts).encode()), dtype=torch.uint8).long()
        kind = "UTF-8 bytes of the prompts"
    else:
        if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) == 0:
            raise ValueError(
                f"train_arms needs token ids [n_tokens], but got {tokens.dtype} of shape {list(tokens.shape)}: flatten "
                "a batch with ids.flatten()."
            )
        raw, kind = tokens.cpu().long(), "token ids that occur"
    return torch.unique(raw, return_inverse=True)[1], kind


def _check(arms: Sequence[str], shape: Mapping[str, int], n_symbols: int, steps: int, evaluations: int) -> None:
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"arm {arm!r} is not known; use {', '.join(ARMS)}.")
    if shape["d_model"] % shape["n_heads"]:
        raise ValueError(f"d_model={shape['d_model']} cannot be divided among n_heads={shape['n_heads']} heads.")
    if steps < 1 or not 1 <= evaluations <= steps:
        raise ValueError(f"steps={steps}, evaluations={evaluations}: needed are 1 <= evaluations <= steps.")
    if n_symbols < 20 * (shape["context"] + 1):
        raise ValueError(
            f"the text has {n_symbols} symbols, but context={shape['context']} needs {20 * (shape['context'] + 1)} "
            "(20 windows, of which 2 are held out): give more text or a shorter context."
        )


def _split(ids: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The first nine tenths `[n]`, and windows of the rest `[window context+1]`."""
    cut = len(ids) * 9 // 10
    windows = ids[cut:].unfold(0, context + 1, context + 1)
    return ids[:cut], windows[:N_VALIDATION]
