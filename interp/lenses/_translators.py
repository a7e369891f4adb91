"""How are the translators of many layers trained? Side by side: one pass and one set of targets serve all of them."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.result import Result
from interp.lenses._divergence import divergence
from interp.lenses._final import FinalNorm
from interp.lenses._output import Output, tiles
from interp.lenses._streams import Batch, Streams

CHECKPOINT = "checkpoint.safetensors"
#: Ridge of the closed-form start, as a share of each feature's variance. Held-out KL hardly moves from 0.001 to 0.1.
_RIDGE = 0.03
#: Largest norm of a translator's gradient; longer ones are scaled down.
_CLIP = 1.0


def translated(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The translator's h + W h + b of streams `[... d_model]`, in the type of the translator."""
    wide = h.to(weight.dtype)
    return wide + wide @ weight.T + bias


def kl(way: Output, streams: Float[Tensor, "token d_model"], batch: Batch) -> Float[Tensor, " token"]:
    """KL(p || q) in nats of what the output map reads in streams, differentiable in them.

    Args:
        way: of the model.
        streams: in place of the last one.
        batch: whose targets p is known by.

    Returns:
        One number a token.
    """
    y = way.norm(streams.to(way.unembed.dtype))
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    if way.cap is not None:
        found: Tensor = _Capped.apply(y, batch.r, way)
        return found
    known = batch.known
    return divergence(
        y, way.unembed, known, bias=way.bias, expected_bias=None if way.bias is None else known.extra[:, 0]
    )


class _Capped(torch.autograd.Function):
    """KL(p || q) `[token]` of y and r `[token d_model]` where logits are capped.

    Then E_p[log q] is not linear in y, and p itself is needed again: 6 d_model d_vocab operations a token, in tiles.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, r: Tensor, way: Output) -> Tensor:
        u, cap = way.unembed.to(y.dtype), way.cap
        assert cap is not None

        def logits(of: Tensor) -> Tensor:
            plain = of @ u if way.bias is None else of @ u + way.bias.to(y.dtype)
            return cap * torch.tanh(plain / cap)

        found, grads = [], []
        for rows in tiles(len(y), u.shape[1]):
            s = logits(y[rows])
            log_q, log_p = s.log_softmax(-1), logits(r[rows].to(y.dtype)).log_softmax(-1)
            p = log_p.exp()
            found.append((p * (log_p - log_q)).sum(-1))
            if ctx.needs_input_grad[0]:
                grads.append(((log_q.exp() - p) * (1 - (s / cap) ** 2)) @ u.T)
        ctx.save_for_backward(torch.cat(grads) if grads else None)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        return outer[0][:, None] * ctx.saved_tensors[0], None, None


@torch.no_grad()
def divergences(way: Output, text: Streams, layers: Sequence[int], weight: Tensor, bias: Tensor) -> np.ndarray:
    """Mean KL(p || q) over a text of each layer's lens, `[layer]`, in nats."""
    sums = np.zeros(len(layers))
    for batch in text.everything():
        for i, layer in enumerate(layers):
            sums[i] += float(kl(way, translated(batch.hidden(layer), weight[i], bias[i]), batch).double().sum())
    return sums / text.n_tokens


@torch.no_grad()
def ridge(norm: FinalNorm, text: Streams, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Translators in closed form: from each layer's stream to the last one, by least squares.

    With x the stream before layer l, t the last one and sigma its scale in the final norm, W and b minimise the sum
    over tokens of |x + W x + b - t|^2 / sigma^2 + `_RIDGE` x (variance of x_j) W_ij^2: errors count as the final norm
    sees them, and a feature counts the same in any unit.

    Args:
        norm: the final norm.
        text: to learn from.
        layers: of the streams.

    Returns:
        `[layer d_model d_model]` and `[layer d_model]`, float32.
    """
    n = len(layers)
    moments: list[Tensor] = []
    # A gain of zero: the norm erases that entry of the stream, and no value of it is better than another.
    inverse = torch.where(norm.gain.abs() > 1e-6 * norm.gain.abs().max(), 1 / norm.gain, 0).double()
    for batch in text.everything():
        scale, target = batch.scale.double()[:, None], (batch.r - norm.bias).double() * inverse
        for i, layer in enumerate(layers):
            x = batch.hidden(layer).double() * scale
            # A last column for the bias; t / sigma is `target`.
            row = torch.cat([x, scale, target - x], 1)
            product = row[:, : x.shape[1] + 1].T @ row
            if len(moments) < n:
                moments.append(product)
            else:
                moments[i] += product
    weights, biases = [], []
    for product in moments:
        d = len(product) - 1
        mean = product[d] / product[d, d]  # of x, 1 and t - x, weighted by 1 / sigma^2
        centred = product[:d] - product[:d, d, None] * mean
        own = centred[:, :d]
        spread = own.diagonal().clamp(min=1e-12 * float(own.diagonal().max()))  # a constant feature is left alone
        solved = torch.linalg.solve(own + _RIDGE * torch.diag(spread), centred[:, d + 1 :])
        weights.append(solved.T)
        biases.append(mean[d + 1 :] - mean[:d] @ solved)
    return torch.stack(weights).float(), torch.stack(biases).float()


class Run:
    """Translators on their way: optimiser, steps done and what was measured, all of which the checkpoint holds too."""

    def __init__(
        self, way: Output, text: Streams, held_out: Streams | None, settings: Mapping[str, Any], file: Path | None,
        start: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        self.way, self.text, self.held_out, self.settings, self.file = way, text, held_out, settings, file
        self.layers: list[int] = settings["layers"]
        self.weight, self.bias = (torch.nn.Parameter(part.to(way.unembed.device)) for part in start)
        self.optimiser = _optimiser([self.weight, self.bias], settings)
        self.step = 0
        self.rows = np.zeros((0, 4))  # step, layer, held-out (0 or 1), nats

    def __iter__(self) -> Any:
        """Train to the end, storing and measuring on the way; yields after each step."""
        if not len(self.rows):
            self._measure()
        sums, n = np.zeros(len(self.layers)), 0
        while self.step < self.settings["steps"]:
            sums, n = sums + self._update(), n + 1
            self.step += 1
            if self.step % self.settings["every"] == 0 or self.step == self.settings["steps"]:
                self._note(sums / n, 0)
                self._measure()
                self.store()
                sums, n = np.zeros(len(self.layers)), 0
            yield self.step

    def _update(self) -> np.ndarray:
        """One step; the loss of each layer before it."""
        settings = self.settings
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        losses = np.zeros(len(self.layers))
        n = settings["units_a_step"] * self.text.per_unit
        for batch in self.text.step(self.step, settings["units_a_step"], settings["seed"]):
            for i, layer in enumerate(self.layers):
                own = [part[i].detach().requires_grad_() for part in (self.weight, self.bias)]
                loss = kl(self.way, translated(batch.hidden(layer), *own), batch).sum() / n
                to_weight, to_bias = torch.autograd.grad(loss, own)
                self.weight.grad[i] += to_weight
                self.bias.grad[i] += to_bias
                losses[i] += float(loss.detach())
        # Each translator's own norm, so that layers trained together equal layers trained one by one.
        norms = (self.weight.grad.square().sum((1, 2)) + self.bias.grad.square().sum(1)).sqrt()
        if not bool(norms.isfinite().all()) or not np.isfinite(losses).all():
            self._stop(losses, norms)
        shrink = (_CLIP / norms.clamp(min=_CLIP))[:, None]
        self.bias.grad *= shrink
        self.weight.grad *= shrink[..., None]
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * (1 - self.step / settings["steps"])
        self.optimiser.step()
        return losses

    def _stop(self, losses: np.ndarray, norms: Tensor) -> None:
        bad = ~np.isfinite(losses) | ~norms.isfinite().cpu().numpy()
        kept = "" if self.file is None or not self.file.is_file() else f" The last good state is kept in {self.file}."
        raise ValueError(
            f"the loss or gradient of layer {self.layers[int(bad.argmax())]} is not finite in step {self.step}: lower "
            f"learning_rate (it is {self.settings['learning_rate']:g}), or look for activations that are not finite."
            + kept
        )

    def _measure(self) -> None:
        if self.held_out is not None:
            self._note(divergences(self.way, self.held_out, self.layers, self.weight, self.bias), 1)

    def _note(self, nats: np.ndarray, held_out: int) -> None:
        rows = [[self.step, layer, held_out, value] for layer, value in zip(self.layers, nats, strict=True)]
        self.rows = np.concatenate([self.rows, np.array(rows)])

    def history(self, meta: Mapping[str, Any]) -> Result:
        """What was measured: columns step, layer, metric and value."""
        step, layer, held_out, value = self.rows.T
        names = np.array(["training", "held-out"], dtype=object)[held_out.astype(int)]
        table = pd.DataFrame({"step": step.astype(int), "layer": layer.astype(int), "metric": names, "value": value})
        return Result("tuned.train", table, "nats", meta=meta)

    def _tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.weight.data, "bias": self.bias.data, "rows": torch.from_numpy(self.rows)}
        for index, state in self.optimiser.state_dict()["state"].items():
            named |= {f"optimiser {index} {name}": tensor for name, tensor in state.items()}
        return named

    def store(self) -> None:
        """Put the state in the place of the one before, whole or not at all."""
        if self.file is None:
            return
        metadata = {"settings": json.dumps(dict(self.settings)), "step": str(self.step)}
        unfinished = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, unfinished, metadata)
            os.replace(unfinished, self.file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            warnings.warn(
                f"the checkpoint {self.file} cannot be written ({error}): training goes on, but cannot be resumed if "
                "it stops. Give a folder with free space.",
                stacklevel=2,
            )

    def restore(self) -> None:
        """Go on from the checkpoint.

        Raises:
            ValueError: one of another model, text or options, or that cannot be read.
        """
        assert self.file is not None
        try:
            with safe_open(self.file, "pt") as stored:
                metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"the checkpoint {self.file} cannot be read ({error}): delete it to start again."
            ) from None
        theirs = json.loads(metadata["settings"])
        for name, value in self.settings.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the checkpoint {self.file} is of a run with {name}={theirs.get(name)!r}, not {value!r}: give "
                    "another folder, or delete the file to start again."
                )
        self.step, self.rows = int(metadata["step"]), tensors.pop("rows").numpy()
        self.weight.data.copy_(tensors.pop("weight"))
        self.bias.data.copy_(tensors.pop("bias"))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            _, index, part = name.split(" ")
            state.setdefault(int(index), {})[part] = tensor
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})


def _optimiser(parameters: list[torch.nn.Parameter], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    found: torch.optim.Optimizer
    if settings["optimiser"] == "sgd":
        # Momentum multiplies the length of a path by 1 / (1 - 0.9), which `learning_rate` counts already.
        found = torch.optim.SGD(parameters, lr=0.1 * rate, momentum=0.9, nesterov=True, weight_decay=decay)
    else:
        found = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.999), amsgrad=True, weight_decay=decay)
    for group in found.param_groups:
        group["initial_lr"] = group["lr"]
    return found


def trained(run: Run) -> None:
    """Run to the end, with a progress bar."""
    for _ in tqdm(run, desc="tuned lens", total=run.settings["steps"], initial=run.step, leave=False, disable=None):
        pass
