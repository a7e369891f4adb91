"""What happens in one training run? Draw, update, measure, store; and go on from what was stored."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from interp.core.batching import batches
from interp.core.result import Result

#: A target that counts for nothing, as in PyTorch and Hugging Face.
IGNORED = -100
#: Prompts that are held out when none are given.
N_HELD_OUT = 1024

UNITS = {
    "loss": "nats per target",
    "accuracy": "fraction of targets",
    "held-out loss": "nats per target",
    "held-out accuracy": "fraction of targets",
}

#: Token ids, and the id to be predicted at each position, or `IGNORED`.
Batch = tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]
#: Draws n prompts with the generator, which is on the CPU.
Draw = Callable[[torch.Generator, int], Batch]


class Run:
    """A module on its way: optimiser, steps done and what was measured, all of which the checkpoint file holds too."""

    def __init__(
        self, module: nn.Module, batch: Draw, held_out: Batch | None, settings: Mapping[str, Any], file: Path | None
    ) -> None:
        self.module, self.batch, self.file = module, batch, file
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        if not self.weights:
            raise ValueError("nothing to train: no parameter of this module has requires_grad=True.")
        matrices = [weight for weight in self.weights.values() if weight.ndim > 1]
        vectors = [weight for weight in self.weights.values() if weight.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.98), fused=True
        )
        self.device = next(iter(self.weights.values())).device
        self.step = 0
        self.by_step = np.zeros((0, 2))  # loss, accuracy
        self.held_out_by_step = np.zeros((0, 3))  # step, loss, accuracy
        if held_out is None:
            self.held_out = self._draw(settings["seed"], 1, 0, N_HELD_OUT)
        else:
            self.held_out = _checked(*held_out, len(held_out[0]), module)
        first = self._draw(settings["seed"], 0, 0, settings["batch_size"])
        digest = hashlib.sha256()
        for tensor in (*first, *self.held_out):
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        self.settings = {**settings, "data": digest.hexdigest()}
        if file is not None and file.is_file():
            self._restore(file)

    def __iter__(self) -> Iterator[float]:
        """Train to the end; measure, store and yield the held-out accuracy on the way."""
        if not len(self.held_out_by_step):
            self._measure()
        yield float(self.held_out_by_step[-1, 2])
        pending: list[Tensor] = []
        while not self._done():
            pending.append(self._update())
            self.step += 1
            if self.step % self.settings["every"] == 0 or self.step == self.settings["steps"]:
                self._take(torch.stack(pending).double().cpu().numpy())
                pending = []
                self._measure()
                self._store()
                yield float(self.held_out_by_step[-1, 2])

    def _done(self) -> bool:
        target, (measured, _, accuracy) = self.settings["stop_at"], self.held_out_by_step[-1].tolist()
        reached = target is not None and measured == self.step and accuracy >= target
        return reached or self.step >= self.settings["steps"]

    def _update(self) -> Tensor:
        """One step; its loss and accuracy, `[2]`, left on the device so that a GPU need not be waited for."""
        tokens, targets = self._draw(self.settings["seed"], 0, self.step, self.settings["batch_size"])
        for group in self.optimiser.param_groups:
            group["lr"] = _learning_rate(self.step, self.settings)
        self.module.train()
        losses, hits, n = _compare(self.module, tokens.to(self.device), targets.to(self.device))
        loss = losses / n
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimiser.step()
        return torch.stack([loss.detach(), hits / n])

    def _draw(self, seed: int, purpose: int, step: int, n: int) -> Batch:
        """Prompts of one step (purpose 0) or to be held out (purpose 1), drawn with a generator of their own."""
        # torch's CPU generator takes 32 bits of a seed.
        own, general = (int(word) for word in np.random.SeedSequence([seed, purpose, step]).generate_state(2))
        torch.default_generator.manual_seed(general)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(general)
        return _checked(*self.batch(torch.Generator().manual_seed(own), n), n, self.module)

    def _take(self, measured: np.ndarray) -> None:
        broken = np.flatnonzero(~np.isfinite(measured[:, 0]))
        if len(broken):
            raise FloatingPointError(
                f"the loss is {measured[broken[0], 0]} at step {len(self.by_step) + broken[0] + 1} of "
                f"{self.settings['steps']}: train with a learning_rate below {self.settings['learning_rate']}."
            )
        self.by_step = np.concatenate([self.by_step, measured])

    @torch.no_grad()
    def _measure(self) -> None:
        self.module.eval()
        tokens, targets = self.held_out
        parts = [
            torch.stack([*_compare(self.module, tokens[rows].to(self.device), targets[rows].to(self.device))])
            for rows in batches(len(tokens), self.settings["batch_size"])
        ]
        losses, hits, n = torch.stack(parts).double().sum(0).tolist()
        self.held_out_by_step = np.concatenate([self.held_out_by_step, [[self.step, losses / n, hits / n]]])

    def history(self) -> Result:
        """What was measured, as a Result."""
        steps = np.arange(1, len(self.by_step) + 1)
        columns = [
            (steps, "loss", self.by_step[:, 0]),
            (steps, "accuracy", self.by_step[:, 1]),
            (self.held_out_by_step[:, 0].astype(int), "held-out loss", self.held_out_by_step[:, 1]),
            (self.held_out_by_step[:, 0].astype(int), "held-out accuracy", self.held_out_by_step[:, 2]),
        ]
        parts = [pd.DataFrame({"step": step, "metric": metric, "value": value}) for step, metric, value in columns]
        meta = {
            **self.settings,
            "n_held_out": len(self.held_out[0]),
            "n_parameters": sum(weight.numel() for weight in self.module.parameters()),
            "n_trained": sum(weight.numel() for weight in self.weights.values()),
            "steps_done": self.step,
            "units": UNITS,
            "torch": torch.__version__,
        }
        return Result("Training", pd.concat(parts, ignore_index=True), "by metric: see meta['units']", meta=meta)

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes, by name: what a checkpoint holds."""
        kept = self.module.state_dict().keys()
        named = {f"weight {name}": weight.data for name, weight in self.weights.items()}
        named |= {f"buffer {name}": buffer for name, buffer in self.module.named_buffers() if name in kept}
        for index, state in self.optimiser.state_dict()["state"].items():
            named |= {f"optimiser {index} {name}": tensor for name, tensor in state.items()}
        return named

    def _store(self) -> None:
        if self.file is None:
            return
        measured = {"by_step": self.by_step, "held_out_by_step": self.held_out_by_step}
        tensors = self._tensors() | {name: torch.as_tensor(array) for name, array in measured.items()}
        metadata = {"settings": json.dumps(self.settings), "step": str(self.step)}
        unfinished = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
            os.replace(unfinished, self.file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            warnings.warn(
                f"the checkpoint {self.file} cannot be written ({error}): training goes on, but cannot be resumed "
                "if it stops. Give a folder with free space.",
                stacklevel=2,
            )

    def _restore(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as stored:
                metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"the checkpoint {file} cannot be read ({error}): delete it to start again.") from None
        theirs = json.loads(metadata["settings"])
        for name, value in self.settings.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the checkpoint {file} is of a run with {name}={theirs.get(name)!r}, not {value!r}: give another "
                    "folder, or delete the file to start again. A module is trained in place: to go on, build it anew."
                )
        self.step = int(metadata["step"])
        self.by_step, self.held_out_by_step = (tensors.pop(name).numpy() for name in ("by_step", "held_out_by_step"))
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimiser ")]:
            _, index, part = name.split(" ")
            state.setdefault(int(index), {})[part] = tensors.pop(name)
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        ours = self._tensors()
        for name, tensor in tensors.items():
            ours[name].copy_(tensor)


def _compare(module: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy, number of targets that have the largest logit, and number of targets."""
    output = module(tokens)
    logits = getattr(output, "logits", output).flatten(0, 1)
    wanted = targets.flatten()
    exact = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(exact, wanted, ignore_index=IGNORED, reduction="sum")
    return losses, (logits.argmax(-1) == wanted).sum().to(losses.dtype), (wanted != IGNORED).sum().to(losses.dtype)


def _learning_rate(step: int, settings: Mapping[str, Any]) -> float:
    peak, warmup, steps = settings["learning_rate"], settings["warmup"], settings["steps"]
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _checked(tokens: Tensor, targets: Tensor, n: int, module: nn.Module) -> Batch:
    """The prompts, or an error that says what is wrong with them."""
    shapes = f"tokens {list(tokens.shape)} ({tokens.dtype}) and targets {list(targets.shape)} ({targets.dtype})"
    if tokens.shape != targets.shape or tokens.ndim != 2 or len(tokens) != n or n < 1:
        raise ValueError(f"the batch has {shapes}, but both must be [{n} pos]: one target a position, -100 for none.")
    if tokens.dtype != torch.int64 or targets.dtype != torch.int64:
        raise ValueError(f"the batch has {shapes}, but both must hold ids, torch.int64: add .long().")
    sizes = getattr(module, "config", None)
    d_vocab = getattr(sizes, "vocab_size", None) or math.inf
    n_ctx = getattr(sizes, "max_position_embeddings", None) or math.inf
    if tokens.shape[1] > n_ctx:
        raise ValueError(f"the batch has prompts of {tokens.shape[1]} tokens, but the context is {n_ctx}: raise n_ctx.")
    wanted = targets[targets != IGNORED]
    if not len(wanted):
        raise ValueError("the batch has no target: some position must have the id to be predicted after it.")
    for name, ids in (("tokens", tokens), ("targets", wanted)):
        if ids.min() < 0 or ids.max() >= d_vocab:
            raise ValueError(
                f"the batch's {name} run from {int(ids.min())} to {int(ids.max())}, but the vocabulary has ids 0 to "
                f"{d_vocab - 1}, and {IGNORED} marks a position without target."
            )
    return tokens.cpu(), targets.cpu()
