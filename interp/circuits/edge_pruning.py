"""Which few edges, all together, predict as the model does? Masks learnt by gradient descent (Edge Pruning)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.circuits._ablated import ABLATIONS, Ablated, Positions, ablated, plain, require_apart
from interp.circuits._checkpoint import Checkpoint, digest_of
from interp.circuits._edges import EdgeRun
from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.core.batching import batches
from interp.core.readout import Readout
from interp.core.registry import method
from interp.models.model import Model
from interp.patching._inputs import provenance, require_decoder
from interp.tasks.task import Task

# Hard-concrete masks: a sigmoid stretched over both ends of [0, 1] and cut, so that 0 and 1 themselves occur.
_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3
# Steps between two states on disk.
_EVERY = 25


@method(name="Edge Pruning", paper="arXiv:2406.16778", notebook="circuit_discovery")
def edge_pruning(
    model: Model,
    task: Task,
    *,
    sparsity: float = 0.95,
    metric: str | Readout = "kl",
    ablation: str = "corrupt",
    grouped: bool = True,
    steps: int = 300,
    lr: float = 0.2,
    lr_multipliers: float = 0.2,
    batch_size: int = 32,
    reference: Task | None = None,
    positions: Positions = None,
    seed: int = 0,
) -> Circuit:
    """The edges that remain when masks on all of them are trained together to be few and to predict as the model does.

    Each edge e has a mask z_e in [0, 1]: its destination reads off_u + z_e (u - off_u). Masks are hard-concrete,
    z = clip(1.2 sigmoid((log(n / (1 - n)) + a_e) / (2/3)) - 0.1, 0, 1) with n uniform and a_e learnt. The loss is

        D + l1 (s - t) + l2 (s - t)^2

    D the mean KL divergence of the masked model's prediction from the whole model's (for another metric, the mean
    absolute difference from the whole model's), s = 1 - mean P(z > 0) the expected share of edges that are out, and t a
    target that rises evenly from 0 to `sparsity` over the first five sixths of the steps. Adam goes down in the a_e and
    up in the two multipliers l1 and l2. At the end the edges with the largest P(z > 0) are in, as many as `sparsity`
    leaves.

    Args:
        model: a decoder.
        task: the prompts, with corrupted ones for ablation="corrupt".
        sparsity: share of the edges that are out in the end, above 0 and below 1.
        metric: "kl", "logit_diff", "log_prob", "prob", or a Readout that is differentiable.
        ablation: what edges that are out carry: "corrupt", "zero", "mean", "position_mean", "resample".
        grouped: whether a key or value that several heads share is one input.
        steps: of training. The default is for toys; the paper's is 3000.
        lr: of the masks.
        lr_multipliers: of the two multipliers.
        batch_size: prompts a step; batches are taken in a new random order each time round.
        reference: prompts of means.
        positions: of destinations at which masks act: names of the task or indices; None for all. At other positions
            every input is whole.
        seed: of the masks' noise and the order of prompts.

    Returns:
        Circuit with round((1 - sparsity) x edges) edges in; `scores` are P(z > 0) of all edges, unit "probability of
        being in". `meta["value"]` is D of the last step, `meta["expected_sparsity"]` the last s.

    Raises:
        ValueError: sparsity, steps, batch size or a learning rate out of range, an unknown metric or ablation, a task
            without what they need, a corrupted prompt that equals its clean one, a loss that is not finite.

    Cost: a step is a forward and a backward pass over all edges, about six bare forward passes of the positions from
        the first on where the prompts differ (SmolLM2-135M, four prompts of 14 tokens of which the last five differ:
        0.6 s of one CPU core, where the whole model takes 0.25 s), and one more forward pass where there are several
        batches, since only the last one's off run is held; the memory of the backward pass, about prompts of a batch x
        positions x d_model x layers x (layers / 5 x (heads + 1) + heads) numbers. Can be stopped and goes on from the
        last 25 steps, unless the metric is a Readout.

    Differs from the paper: there are no masks on nodes besides those on edges; s is the expectation and not the masks
        drawn; the learning rates are 0.2 instead of 0.8 with 200 steps of warm-up, and there is no warm-up, since steps
        are fewer; prompts are not padded to 64 tokens.

    Example:
        >>> from interp.models import planted
        >>> case = planted.and_gate()
        >>> task = Task("and", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
        >>> found = edge_pruning(case.model, task, sparsity=1 - 5 / 75, steps=120)
        >>> {(row.src, row.dst) for row in found.edges.itertuples()} == set(case.edges)
        True
    """
    _require(model, sparsity, steps, batch_size, {"lr": lr, "lr_multipliers": lr_multipliers}, ablation)
    require_apart(task, ablation)
    graph = Graph.of(model, grouped=grouped)
    made = ablated(
        model, task, graph, metric=metric, ablation=ablation, reference=reference, positions=positions, seed=seed
    )
    training = _Training(made, list(batches(len(task), batch_size)), lr, lr_multipliers, seed)
    read = training.run(0).read
    meta = provenance(
        model, task, method="edge pruning", sparsity=sparsity, metric=read.name, ablation=ablation, grouped=grouped,
        steps=steps, lr=lr, lr_multipliers=lr_multipliers, batch_size=batch_size, seed=seed,
        positions=plain(positions), **digest_of(made, graph.possible),
    )  # fmt: skip
    checkpoint = Checkpoint(None if isinstance(metric, Readout) else meta)
    begun = checkpoint.load(training.shapes())
    if begun is not None:
        training.restore(begun)
    distance = math.nan
    with tqdm(total=steps, initial=training.step, desc="edge pruning", leave=False) as bar:
        while training.step < steps:
            target = sparsity * min(1.0, training.step / max(1.0, steps * 5 / 6))
            distance = training.move(target)
            bar.update()
            if training.step % _EVERY == 0 and training.step < steps:
                checkpoint.store(training.state())
    checkpoint.clear()
    scores = np.zeros(graph.possible.shape)
    scores[graph.possible] = stays(training.log_alpha.detach().double()).cpu().numpy()
    expected = 1 - float(scores[graph.possible].mean())
    meta |= {"value": distance, "expected_sparsity": expected, "metric_unit": read.unit}
    whole = Circuit.of(graph, scores, unit="probability of being in", meta=meta)
    return whole.top(max(1, round((1 - sparsity) * graph.n_edges)), by="signed")


def stays(log_alpha: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """P(z > 0) of hard-concrete masks.

    Args:
        log_alpha: their parameters.

    Returns:
        Probabilities.
    """
    return torch.sigmoid(log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH))


def drawn(log_alpha: Float[Tensor, "*any"], noise: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Hard-concrete masks.

    Args:
        log_alpha: their parameters.
        noise: uniform in (0, 1).

    Returns:
        Numbers in [0, 1], both ends among them.
    """
    soft = torch.sigmoid((torch.logit(noise, eps=1e-6) + log_alpha) / _TEMPERATURE)
    return (soft * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


class _Training:
    """Masks, multipliers and their optimisers, one step at a time."""

    def __init__(self, made: Ablated, rows: list[slice], lr: float, lr_multipliers: float, seed: int) -> None:
        self.made, self.rows, self.step = made, rows, 0
        self._run: tuple[int, EdgeRun] | None = None
        device, self.possible = made.task.clean.device, torch.as_tensor(made.graph.possible)
        # Masks begin open: P(z > 0) = 0.97.
        self.log_alpha = torch.full((made.graph.n_edges,), 2.0, device=device, requires_grad=True)
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)
        self.down = torch.optim.Adam([self.log_alpha], lr=lr)
        self.up = torch.optim.Adam([self.multipliers], lr=lr_multipliers, maximize=True)
        self.seed, self.full = seed, [self._full(which) for which in range(len(rows))]

    @torch.no_grad()
    def _full(self, which: int) -> Tensor:
        return self.run(which).forward(self.possible[None].to(self.log_alpha))[0][0]

    def run(self, which: int) -> EdgeRun:
        """A batch made ready. Only the last one is held, so that memory does not grow with the prompts."""
        if self._run is None or self._run[0] != which:
            self._run = None
            self._run = which, self.made.run(self.rows[which])
        return self._run[1]

    def move(self, target: float) -> float:
        """One step; how far the predictions of its prompts were from the model's."""
        # The numbers of a step are the same whether or not the run was stopped before.
        turn, at = divmod(self.step, len(self.rows))
        which = int(np.random.default_rng([self.seed, 0, turn]).permutation(len(self.rows))[at])
        run = self.run(which)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        noise = torch.rand(len(self.log_alpha), generator=generator).to(self.log_alpha)
        weights = self.log_alpha.new_zeros(self.possible.shape)
        weights[self.possible.to(weights.device)] = drawn(self.log_alpha, noise)
        metric = run.forward(weights[None])[0][0]
        far = metric if run.read.name == "kl" else (metric - self.full[which]).abs()
        distance = far.mean()
        apart = 1 - stays(self.log_alpha).mean() - target
        loss = distance + self.multipliers[0] * apart + self.multipliers[1] * apart**2
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss is {float(loss.detach())} at step {self.step}: the activations overflow. Load the model in "
                "float32, or take a smaller lr."
            )
        gradients = torch.autograd.grad(loss, [self.log_alpha, self.multipliers])
        self.log_alpha.grad, self.multipliers.grad = gradients
        self.down.step()
        self.up.step()
        self.step += 1
        return float(distance.detach())

    def state(self) -> dict[str, np.ndarray]:
        """All that the next step depends on."""
        found: dict[str, Any] = {"step": np.array(self.step)}
        for name, parameter, optimiser in self._parts():
            own = optimiser.state[parameter]
            found |= {name: parameter.detach(), f"{name}_mean": own["exp_avg"], f"{name}_square": own["exp_avg_sq"]}
        return {name: each.cpu().numpy() if isinstance(each, Tensor) else each for name, each in found.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of `state`."""
        found: dict[str, tuple[int, ...]] = {"step": ()}
        for name, parameter, _ in self._parts():
            found |= dict.fromkeys((name, f"{name}_mean", f"{name}_square"), tuple(parameter.shape))
        return found

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        self.step = int(state["step"])
        for name, parameter, optimiser in self._parts():
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(state[name]))
            optimiser.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": torch.from_numpy(state[f"{name}_mean"]).to(parameter),
                "exp_avg_sq": torch.from_numpy(state[f"{name}_square"]).to(parameter),
            }

    def _parts(self) -> list[tuple[str, Tensor, torch.optim.Optimizer]]:
        return [("log_alpha", self.log_alpha, self.down), ("multipliers", self.multipliers, self.up)]


def _require(
    model: Model, sparsity: float, steps: int, batch_size: int, rates: dict[str, float], ablation: str
) -> None:
    require_decoder(model)
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: it is the share of edges that are out, above 0 and below 1.")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    for name, rate in rates.items():
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"{name}={rate}: a learning rate is a number above 0, for example {name}=0.2.")
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation={ablation!r} is not known; use one of {', '.join(ABLATIONS)}.")
