"""What would cutting each edge do, by the gradient? All edges at once, for a few forward passes.

Edge attribution patching (EAP, arXiv 2310.10348), with integrated gradients (EAP-IG, arXiv 2403.17806) and with the
coefficients of layer-wise relevance propagation (RelP, arXiv 2508.21258).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from interp.circuits._eap_job import Job
from interp.circuits._edge_gradients import Plan
from interp.circuits._edge_maps import Rules
from interp.circuits.circuit import Circuit
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.tasks.task import Task

#: What a cut edge carries: what its source writes on the corrupted prompt, nothing, or its mean.
Ablation = Literal["corrupt", "zero", "mean", "position_mean"]
#: Where integrated gradients are taken.
Path = Literal["embedding", "activation", "ends"]
#: Which points of the path: k = 1..m of m, k = 0..m-1, or the middles between them.
Grid = Literal["paper", "code", "midpoint"]

#: How far the first point of a path is from the clean run, in steps.
_GRIDS = {"paper": 0.0, "code": 1.0, "midpoint": 0.5}


@method(name="EAP: edge attribution patching", paper="arXiv:2310.10348", notebook="circuit_discovery")
def eap(
    model: Model,
    task: Task,
    *,
    ablation: Ablation = "corrupt",
    reference: Task | None = None,
    grouped: bool = True,
    positions: str | int | Sequence[str | int] | None = None,
    metric: str | Readout = "logit_diff",
    batch_size: int | None = None,
) -> Circuit:
    """What cutting each edge would do to the metric, estimated from the gradient at the clean run, for all at once.

    For an edge from a source u to an input v of a later component, with everything else as in the clean run,

        score(u -> v) = mean over prompts of: sum over positions of (off_u - clean_u) . dm / d(stream as v reads it)

    where u adds clean_u to the residual stream on the clean prompt and off_u where the edge is out, m is the metric,
    and v reads the stream before its norm. The queries, keys and values of each head (keys and values of each key-value
    group), each MLP and the logits read it separately. A score is the estimated change of the metric when the edge is
    cut: negative for an edge that helps the answer. It is exact where the metric is linear in what v reads, and blind
    where it is flat at the clean run: a saturated softmax or MLP, an OR, a backup.

    Args:
        model: a decoder.
        task: with answers and, for ablation="corrupt", corrupted prompts.
        ablation: off_u: "corrupt" (what u writes on the paired prompt), "zero", "mean" (over prompts and positions) or
            "position_mean" (over prompts, for prompts of one length).
        reference: prompts of the means; None for the task's clean ones.
        grouped: whether a key or value that several heads share is one input, as in the model, or one a head.
        positions: where inputs are counted: names of the task or indices; None for all. Scores of "end" are those of
            edges at the last position.
        metric: "logit_diff", "log_prob", "prob" or a Readout of one number a prompt.
        batch_size: prompts at once; None chooses from the free memory. It does not change the scores beyond rounding.

    Returns:
        Circuit with all edges in, see `Circuit.top` and `greedy`; unit that of the metric. `meta` has the mean metric
        of the clean and, where it was run, of the corrupted prompts.

    Raises:
        ValueError: no corrupted prompts, or one that equals its clean prompt or is padded otherwise; metric="kl", whose
            gradient is 0 at the clean run; a metric of several numbers; an unknown ablation or position; a score
            that is not finite (the prompt is named); an encoder.
        NoProgramError: the model has no layer-by-layer program, a norm that is neither LayerNorm nor RMSNorm, or heads
            that do not add up (Gemma 2).

    Cost: two forward passes and a backward pass by activations, and the products of gradients and sources, edges x
        tokens x d_model multiplications; 3.6 forward passes in all on SmolLM2-135M (70,651 edges, 16 pairs of 14
        tokens, CPU time). Memory: layers x tokens x (4 d_model + 2 d_mlp + queries, keys and values), and about 100 MB
        for widened gradients and sources; nothing has a d_model for each source or edge of the model.

    Differs from the paper: positional embeddings are part of the source "input", so that the sources sum to the stream.
        Nothing is pruned here (`Circuit.pruned`). Attention's output bias belongs to no source.

    Example:
        >>> from interp.models import planted
        >>> case = planted.cancelling_pair()
        >>> task = Task("pair", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
        >>> into = eap(case.model, task).edges.query("dst == 'logits'").set_index("src")["value"]
        >>> [round(float(into[head]), 2) for head in ("a1.h0", "a0.h1", "a1.h2")]  # the last one hinders
        [-16.0, -32.0, 32.0]
    """
    chosen = _eap(ablation, metric)
    return _circuit(Job(model, task, "eap", *chosen, reference, grouped, positions, metric, batch_size))


@method(
    name="EAP-IG: edge attribution with integrated gradients", paper="arXiv:2403.17806", notebook="circuit_discovery"
)
def eap_ig(
    model: Model,
    task: Task,
    *,
    steps: int = 5,
    path: Path = "embedding",
    grid: Grid = "paper",
    ablation: Ablation = "corrupt",
    reference: Task | None = None,
    grouped: bool = True,
    positions: str | int | Sequence[str | int] | None = None,
    metric: str | Readout = "logit_diff",
    batch_size: int | None = None,
) -> Circuit:
    """What cutting each edge would do to the metric, by the mean gradient on the way from the corrupted run.

    As `eap`, with the gradient replaced by its mean over m points:

    - path="embedding" (EAP-IG, inputs): runs whose embeddings are e* + (k/m)(e - e*), from the corrupted prompt's e* to
      the clean one's e. The scores of the edges out of the input sum to m(corrupt) - m(clean) as m grows.
    - path="activation" (EAP-IG, activations): one group of sources is on the way, the heads of one layer or one MLP or
      the input, and everything before it is clean; the points are for the edges out of that group. These sum to the
      exact effect of replacing the outputs of the group together as m grows.
    - path="ends" (clean-corrupted): the mean of the gradients of the clean and of the corrupted run, without m.

    Args:
        model: a decoder.
        task: as for `eap`.
        steps: m, the number of points. Not used by path="ends".
        path: see above.
        grid: "paper" has the points k = 1..m (the last is the clean run), "code" k = 0..m-1 (the first is the corrupted
            run), "midpoint" k = 1/2..m-1/2, whose error falls as 1/m^2 where that of the others falls as 1/m.
        ablation: as for `eap`; all but "corrupt" have no embeddings to start from and need path="activation".
        reference: as for `eap`.
        grouped: as for `eap`.
        positions: as for `eap`.
        metric: as for `eap`, or "kl", from the clean run.
        batch_size: as for `eap`.

    Returns:
        Circuit, as `eap`.

    Raises:
        ValueError: as `eap`; no steps, an unknown path or grid, a path that the ablation has no start for.
        NoProgramError: as `eap`.

    Cost: two forward passes, one forward and one backward pass a point (no forward pass for the points that are the
        clean or the corrupted run), and once the products of `eap`. path="activation": one backward pass, and for each
        of 2 x layers + 1 groups m points (m - 1 on the grid "paper"), each from its layer on. Memory: as `eap`, times
        the points.

    Differs from the paper: as `eap`. That the paper has k = 1..m is from memory; its code has 0..m-1. With
        path="activation" the authors' code gives every edge the mean gradient over the ways of all groups, its own and
        others; here an edge has the way of its own source, whose scores add up to an effect.

    Example:
        >>> from interp.models import planted
        >>> case = planted.or_gate()
        >>> task = Task("or", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
        >>> found = [eap_ig(case.model, task, grid=grid) for grid in ("paper", "code")]
        >>> edge, gap = found[0].graph.edge("a0.h1", "m1"), found[0].meta["clean"] - found[0].meta["corrupt"]
        >>> [round(float(each.scores[edge] / gap), 3) for each in found]
        [-0.4, -0.6]
    """
    chosen = _eap_ig(ablation, metric, steps=steps, path=path, grid=grid)
    return _circuit(Job(model, task, "eap_ig", *chosen, reference, grouped, positions, metric, batch_size))


@method(name="RelP: edges by relevance coefficients", paper="arXiv:2508.21258", notebook="circuit_discovery")
def relp(
    model: Model,
    task: Task,
    *,
    at: Literal["corrupt", "clean"] = "corrupt",
    freeze_attention: bool = False,
    ablation: Ablation = "corrupt",
    reference: Task | None = None,
    grouped: bool = True,
    positions: str | int | Sequence[str | int] | None = None,
    metric: str | Readout = "logit_diff",
    batch_size: int | None = None,
) -> Circuit:
    """What cutting each edge would do to the metric, by the coefficients of layer-wise relevance propagation.

    As `eap`, with these in place of derivatives on the way back (values are unchanged):

    - the scale of a norm is a constant (LN-rule);
    - an activation function f has the slope f(x) / x (Identity-rule);
    - of a product of an activation and a gate, each factor gets half the derivative (Half-rule);
    - with `freeze_attention`, attention patterns are constants (AH-rule), and the edges into queries and keys score 0.

    The coefficients are those of the run `at`. With all rules, at="clean", ablation="zero", and no biases, the scores
    of the edges out of the input sum to minus the metric, if that is linear in the logits.

    Args:
        model: a decoder.
        task: as for `eap`.
        at: "corrupt", as the paper's demonstration has it, or "clean", as `eap` has it.
        freeze_attention: whether to use the AH-rule, which the paper lists and its demonstration does not use.
        ablation: as for `eap`.
        reference: as for `eap`.
        grouped: as for `eap`.
        positions: as for `eap`.
        metric: as for `eap`; "kl", from the clean run, with at="corrupt".
        batch_size: as for `eap`.

    Returns:
        Circuit, as `eap`.

    Raises:
        ValueError: as `eap`; an unknown run; at="corrupt" without corrupted prompts.
        NoProgramError: as `eap`.

    Cost: as `eap`.

    Differs from the paper: it has (clean - corrupt) times the coefficients of the corrupted run, the estimated gain
        from restoring; a score here is minus that, the change when the edge is cut, so that methods compare. The paper
        scores nodes; edges are by the same coefficients.

    Example:
        >>> from interp.models import planted
        >>> case = planted.cancelling_pair()
        >>> task = Task("pair", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
        >>> bool(np.allclose(relp(case.model, task).scores, eap(case.model, task).scores, atol=1e-4))  # it is linear
        True
    """
    chosen = _relp(ablation, metric, at=at, freeze_attention=freeze_attention)
    return _circuit(Job(model, task, "relp", *chosen, reference, grouped, positions, metric, batch_size))


def edge_scores(
    model: Model,
    task: Task,
    *,
    estimate: Literal["eap", "eap_ig", "relp"] = "eap",
    ablation: Ablation = "corrupt",
    reference: Task | None = None,
    grouped: bool = True,
    positions: str | int | Sequence[str | int] | None = None,
    metric: str | Readout = "logit_diff",
    batch_size: int | None = None,
    **options: Any,
) -> Result:
    """The scores of every prompt: what the means of `eap`, `eap_ig` and `relp` are means of.

    For the stability of a circuit under other prompts: `Circuit.of(Graph.of(model), scores[some].mean(0), unit=...)`.

    Args:
        model: a decoder.
        task: as for `eap`.
        estimate: "eap", "eap_ig" or "relp".
        ablation: as for `eap`.
        reference: as for `eap`.
        grouped: as for `eap`.
        positions: as for `eap`.
        metric: as for that method.
        batch_size: as for `eap`.
        **options: of that method, for example steps=5.

    Returns:
        Result, one row a prompt; `value` is the sum of the scores of the edges out of the input, `value_clean` and,
        where it was run, `value_corrupt` the metric. Unit that of the metric. Array "scores" `[prompt dst src]`,
        float32, with the rows and columns of `Graph`; 0 where there is no edge.

    Raises:
        ValueError: as that method.

    Cost: as that method, and prompts x destinations x sources x 4 bytes (0.6 MB a prompt on SmolLM2-135M).

    Example:
        >>> from interp.models import planted
        >>> case = planted.or_gate()
        >>> task = Task("or", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong)
        >>> edge_scores(case.model, task, estimate="eap_ig", steps=2).arrays["scores"][1].shape
        (18, 21, 9)
    """
    plans: dict[str, Callable[..., tuple[Plan, dict[str, Any]]]] = {"eap": _eap, "eap_ig": _eap_ig, "relp": _relp}
    if estimate not in plans:
        raise ValueError(f"estimate={estimate!r} is not known; use one of {', '.join(plans)}.")
    chosen = plans[estimate](ablation, metric, **options)
    job = Job(model, task, estimate, *chosen, reference, grouped, positions, metric, batch_size)
    found = job.run(each=True)
    scores = found.pop("scores")
    table = pd.DataFrame({"prompt": np.arange(len(task)), "value": scores[:, :, 0].sum(1, dtype=np.float64)})
    table = table.assign(**{f"value_{name}": ends for name, ends in found.items()})
    return Result("circuits.eap.edge_scores", table, job.unit, {"scores": (("prompt", "dst", "src"), scores)}, job.meta)


def _circuit(job: Job) -> Circuit:
    found = job.run(each=False)
    means: dict[str, float] = {name: float(found[name].mean()) for name in ("clean", "corrupt") if name in found}
    return Circuit.of(job.graph, found["scores"][0] / len(job.task), unit=job.unit, meta={**job.meta, **means})


def _eap(ablation: str, metric: str | Readout) -> tuple[Plan, dict[str, Any]]:
    _refuse_kl(metric, at_clean=True)
    return Plan(ablation, (0.0,), "embedding", Rules()), {}


def _eap_ig(
    ablation: str, metric: str | Readout, *, steps: int = 5, path: str = "embedding", grid: str = "paper"
) -> tuple[Plan, dict[str, Any]]:
    if path not in ("embedding", "activation", "ends"):
        raise ValueError(f"path={path!r} is not known; use 'embedding', 'activation' or 'ends'.")
    if grid not in _GRIDS:
        raise ValueError(f"grid={grid!r} is not known; use one of {', '.join(_GRIDS)}.")
    if steps < 1:
        raise ValueError(f"steps={steps}: give the number of points of the path, for example steps=5.")
    if path != "activation" and ablation in ("zero", "mean", "position_mean"):
        raise ValueError(
            f"ablation={ablation!r} gives values of activations, and no embeddings for a path to start from: pass "
            "path='activation', or ablation='corrupt'."
        )
    if path == "ends":
        return Plan(ablation, (0.0, 1.0), "embedding", Rules()), {"path": path}
    distances = tuple((_GRIDS[grid] + index) / steps for index in range(steps))
    _refuse_kl(metric, at_clean=distances == (0.0,))
    return Plan(ablation, distances, path, Rules()), {"steps": steps, "path": path, "grid": grid}


def _relp(
    ablation: str, metric: str | Readout, *, at: str = "corrupt", freeze_attention: bool = False
) -> tuple[Plan, dict[str, Any]]:
    if at not in ("corrupt", "clean"):
        raise ValueError(f"at={at!r} is not known; use 'corrupt' (as in the paper) or 'clean'.")
    _refuse_kl(metric, at_clean=at == "clean")
    rules = Rules(lrp=True, attention=freeze_attention)
    chosen: dict[str, Any] = {"at": at, "freeze_attention": freeze_attention}
    return Plan(ablation, (1.0,) if at == "corrupt" else (0.0,), "embedding", rules), chosen


def _refuse_kl(metric: str | Readout, *, at_clean: bool) -> None:
    name = metric.name if isinstance(metric, Readout) else metric
    if name == "kl" and at_clean:
        raise ValueError(
            "the gradient of a divergence from the clean run is 0 at the clean run: take metric='logit_diff' or "
            "'log_prob', or points on a path, eap_ig(..., steps=5)."
        )
