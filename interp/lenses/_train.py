"""How are the lenses of many heads trained at once? One pass over the cached tokens, each target made once for all."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.lenses._divergence import Targets, _walk, divergence
from interp.lenses._final import written_maps
from interp.lenses._full import full_divergence
from interp.lenses._output import output
from interp.lenses.cached import Cached
from interp.models.model import Model

#: The ridge, as a share of the mean variance of what is read.
_RIDGE = 0.3
#: Tokens added to the model's mean prediction, spread over the vocabulary, before its logarithm is taken.
_SMOOTHING = 10.0
#: A bias moves this much faster than a map: its entries are logits, those of a map are multiplied up.
_BIAS_RATE = 10.0
#: Steps between two checkpoints.
_EVERY = 4
#: Tokens in memory together, where all of them are gone through.
_TOKENS = 1024


class Training:
    """Maps and biases of some layers' heads on their way, and what was measured.

    Args:
        model: the model.
        cached: of site "z".
        layers: whose heads.
        settings: all that decides the outcome, JSON types.
        validation: held-out activations, or None.
        folder: for the checkpoint, or None.
    """

    def __init__(
        self,
        model: Model,
        cached: Cached,
        layers: list[int],
        settings: Mapping[str, Any],
        validation: Cached | None,
        folder: Path | None,
    ) -> None:
        self.model, self.cached, self.layers, self.settings = model, cached, layers, dict(settings)
        self.out, self.validation = output(model), validation
        self.additive, self.full = settings["estimand"] == "additive", settings["form"] == "full"
        self.file = None if folder is None else folder / "checkpoint.safetensors"
        self.maps: dict[int, Tensor] = {}
        self.biases: dict[int, Tensor] = {}
        for layer in layers:
            self.maps[layer], self.biases[layer] = self._start(layer)
        self.origin = {layer: value.clone() for layer, value in self.maps.items() if settings["weight_decay"]}
        for value in self._parameters():
            value.requires_grad_()
        self.step = 0
        self.measured = np.zeros((0, 5))  # step, layer, head (-1: all), 0 training or 1 validation, KL

    def _parameters(self) -> list[Tensor]:
        return [*self.maps.values(), *self.biases.values()]

    # --- the start ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, layer: int) -> tuple[Tensor, Tensor]:
        """Maps `[lens input out]` and biases `[lens d_vocab]`; additive: one lens of all heads' inputs."""
        n, device = len(self.cached), self.model.device
        mean = torch.stack([self._read(self.cached, layer, part).sum(1) for part in batches(n, _TOKENS)]).sum(0) / n
        if self.settings["start"] == "direct":
            maps = written_maps(self.model, [layer])[layer] * self.cached.scale.mean().to(device)
            maps = maps.flatten(0, 1)[None] if self.additive else maps
        else:
            centre = self.cached.r.mean(0).to(device)
            own, cross = mean.new_zeros(len(mean), *2 * mean.shape[1:]), mean.new_zeros(*mean.shape, len(centre))
            for part in batches(n, _TOKENS):
                x = self._read(self.cached, layer, part) - mean[:, None]
                own += x.mT @ x
                cross += x.mT @ (self.cached.r[part].to(device) - centre)
            ridge = _RIDGE * own.diagonal(dim1=1, dim2=2).mean(1)
            own.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
            maps = torch.linalg.solve(own, cross)
        total, d_vocab = self.cached.total.to(device), self.model.d_vocab
        prior = ((total + _SMOOTHING / d_vocab) / (n + _SMOOTHING)).log()
        unembed = self.out.unembed.to(maps.dtype)
        # At the mean of what it reads, a lens starts with the model's mean prediction.
        biases = prior - torch.einsum("hi,hid->hd", mean, maps) @ unembed
        return (maps @ unembed if self.full else maps).contiguous(), biases.contiguous()

    def _read(self, cached: Cached, layer: int, rows: Tensor | slice) -> Tensor:
        """What each lens of a layer reads, `[lens token input]`."""
        z = cached.activation(layer, rows)
        return z.flatten(1)[None] if self.additive else z.transpose(0, 1)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def _known(self, cached: Cached, rows: Tensor | slice) -> tuple[Tensor, Targets]:
        """R and the targets of some tokens; for low-rank lenses with the sum of p, which their biases need."""
        r, known = cached.r[rows].to(self.model.device), cached.targets(rows)
        if self.full:
            return r, known
        return r, known._replace(total=_walk(r, self.out.unembed, self.out.bias, cap=self.out.cap, total=True).total)

    def _kl(self, cached: Cached, layer: int, rows: Tensor | slice, r: Tensor, known: Targets) -> Tensor:
        """Mean KL over the tokens, `[lens]`."""
        x, maps, bias = self._read(cached, layer, rows), self.maps[layer], self.biases[layer]
        if self.full:
            kl = full_divergence(x, maps, bias, r, self.out.unembed, self.out.bias, cap=self.out.cap)
        else:
            kl = divergence(x @ maps, self.out.unembed, known, bias=bias)
        return kl.mean(-1)

    def _pull(self, layer: int) -> Tensor | float:
        decay = self.settings["weight_decay"]
        return 0.5 * decay * (self.maps[layer] - self.origin[layer]).square().sum() if decay else 0.0

    # --- the ways down -----------------------------------------------------------------------------------------------

    def adam(self) -> None:
        """Adam with a rate that falls linearly to 0, from the checkpoint if there is one."""
        rate, size = self.settings["learning_rate"], self.settings["tokens_per_step"]
        optimiser = torch.optim.Adam(
            [
                {"params": list(self.maps.values()), "share": 1.0},
                {"params": list(self.biases.values()), "share": _BIAS_RATE},
            ],
            lr=rate,
        )
        if self.file is not None and self.file.is_file():
            self._restore(optimiser, self.file)
        else:
            self._validate()
        per_epoch = list(batches(len(self.cached), size))
        n_steps = self.settings["epochs"] * len(per_epoch)
        with tqdm(total=n_steps, initial=self.step, desc="Attention lenses", leave=False, disable=None) as bar:
            while self.step < n_steps:
                epoch, place = divmod(self.step, len(per_epoch))
                rows = self._order(epoch)[per_epoch[place]]
                for group in optimiser.param_groups:
                    group["lr"] = group["share"] * rate * (1 - self.step / n_steps)
                optimiser.zero_grad()
                self._backward(rows)
                optimiser.step()
                self.step += 1
                bar.update()
                if self.step % len(per_epoch) == 0:
                    self._validate()
                if self.step % _EVERY == 0 or self.step == n_steps:
                    self._store(optimiser)

    def _order(self, epoch: int) -> Tensor:
        own = int(np.random.SeedSequence([self.settings["seed"], epoch]).generate_state(1)[0])
        return torch.randperm(len(self.cached), generator=torch.Generator().manual_seed(own))

    def _backward(self, rows: Tensor) -> None:
        rows = rows.sort().values  # read from the file in its order
        r, known = self._known(self.cached, rows)
        found = []
        for layer in self.layers:
            kl = self._kl(self.cached, layer, rows, r, known)
            self._require_finite(layer, kl.detach())
            (kl.sum() + self._pull(layer)).backward()
            found.append(kl.detach())
        self._record(0, found)

    def lbfgs(self) -> None:
        """L-BFGS on all tokens, layer by layer; an epoch is one iteration."""
        self._validate()
        n, cuts = len(self.cached), list(batches(len(self.cached), _TOKENS))
        found: list[Tensor] = []
        last: dict[int, Tensor] = {}
        for layer in tqdm(self.layers, desc="Attention lenses", leave=False, disable=None):
            parameters = [self.maps[layer], self.biases[layer]]
            optimiser = torch.optim.LBFGS(
                parameters, max_iter=self.settings["epochs"], history_size=20, line_search_fn="strong_wolfe",
                tolerance_grad=1e-9, tolerance_change=1e-12,
            )  # fmt: skip

            def closure(layer: int = layer, optimiser: torch.optim.LBFGS = optimiser) -> float:
                optimiser.zero_grad()
                sums = torch.zeros(())
                for part in cuts:
                    kl = self._kl(self.cached, layer, part, *self._known(self.cached, part))
                    self._require_finite(layer, kl.detach())
                    share = (part.stop - part.start) / n
                    (share * kl.sum()).backward()
                    sums = sums + share * kl.detach().cpu()
                pull = torch.as_tensor(self._pull(layer))
                if pull.requires_grad:
                    pull.backward()
                last[layer] = sums
                return float(sums.sum() + pull.detach().cpu())

            optimiser.step(closure)
            found.append(last[layer])
        self.step = self.settings["epochs"]
        self._record(0, found)
        self._validate()

    def _require_finite(self, layer: int, kl: Tensor) -> None:
        if bool(kl.isfinite().all()):
            return
        kept = ""
        if self.file is not None:
            there = self.file.is_file()
            kept = f" The last good checkpoint is {self.file}." if there else " There was no checkpoint yet."
        raise FloatingPointError(
            f"the KL of layer {layer} is {float(kl.sum())} at step {self.step + 1}: train with a learning_rate below "
            f"{self.settings['learning_rate']}.{kept}"
        )

    # --- what is measured --------------------------------------------------------------------------------------------

    def _record(self, kind: int, found: list[Tensor]) -> None:
        # What Adam measures at a step is of before its update; the step itself is counted after it.
        step = self.step + (kind == 0 and self.settings["optimiser"] == "adam")
        rows = [
            (step, layer, -1 if self.additive else head, kind, value)
            for layer, values in zip(self.layers, found, strict=True)
            for head, value in enumerate(values.double().cpu().tolist())
        ]
        self.measured = np.concatenate([self.measured, np.array(rows, dtype=float)])

    @torch.no_grad()
    def _validate(self) -> None:
        held_out = self.validation
        if held_out is None:
            return
        sums = [self.maps[layer].new_zeros(len(self.maps[layer])) for layer in self.layers]
        for part in batches(len(held_out), _TOKENS):
            r, known = self._known(held_out, part)
            for layer, total in zip(self.layers, sums, strict=True):
                total += self._kl(held_out, layer, part, r, known) * (part.stop - part.start)
        self._record(1, [total / len(held_out) for total in sums])

    # --- the checkpoint ----------------------------------------------------------------------------------------------

    def _state(self, optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
        for kind, values in (("map", self.maps), ("bias", self.biases)):
            yield from ((f"{kind} {layer}", value.data) for layer, value in values.items())
        for index, state in optimiser.state_dict()["state"].items():
            yield from ((f"optimiser {index} {name}", value) for name, value in state.items())

    def _store(self, optimiser: torch.optim.Optimizer) -> None:
        if self.file is None or not all(bool(value.isfinite().all()) for value in self._parameters()):
            return  # what comes next would be an error, and the last good one stays
        tensors = dict(self._state(optimiser)) | {"measured": torch.from_numpy(self.measured)}
        about = {"settings": json.dumps(self.settings, sort_keys=True), "step": str(self.step)}
        unfinished = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished, about)
            os.replace(unfinished, self.file)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            warnings.warn(
                f"the checkpoint {self.file} cannot be written ({error}): training goes on, but cannot be resumed "
                "from here. Give a folder with free space.",
                stacklevel=2,
            )

    def _restore(self, optimiser: torch.optim.Optimizer, file: Path) -> None:
        try:
            with safe_open(file, "pt") as stored:
                about, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"the checkpoint {file} cannot be read ({error}): delete it to start again.") from None
        theirs = json.loads(about["settings"])
        for name, value in self.settings.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the checkpoint {file} is of a run with {name}={theirs.get(name)!r}, not {value!r}: give another "
                    "folder, or delete the file to start again."
                )
        self.step, self.measured = int(about["step"]), tensors.pop("measured").numpy()
        state: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("optimiser ")]:
            _, index, part = name.split(" ")
            state.setdefault(int(index), {})[part] = tensors.pop(name)
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        for name, value in self._state(optimiser):
            if name in tensors:
                value.copy_(tensors[name])
