"""How does a prediction form over the layers? What is measured of it at each, and the depth at which it is settled."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.result import Result

#: What `statistics` measures, {name: (definition, unit)}, with q the lens's distribution of the next token, p the
#: model's, and t the target token.
STATISTICS = {
    "log_prob": ("log q(t)", "nats"),
    "cross_entropy": ("-log q(t)", "nats"),
    "rank": ("how many other tokens have at least the target's probability", "tokens"),
    "entropy": ("-sum q log q", "nats"),
    "max_probability": ("max q", "probability"),
    "forward_kl": ("KL(p || q) = sum p (log p - log q)", "nats"),
    "reverse_kl": ("KL(q || p) = sum q (log q - log p)", "nats"),
    "js_divergence": ("(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most log 2", "nats"),
    "total_variation": ("sum |p - q| / 2", "probability"),
}


def statistics(
    log_q: Float[Tensor, "*rows d_vocab"],
    log_p: Float[Tensor, "*rows d_vocab"],
    target: Int[Tensor, "*rows"] | None = None,
) -> dict[str, Float[Tensor, "*rows"]]:
    """What `STATISTICS` names, of a lens's log-probabilities beside the model's.

    Args:
        log_q: of the lens, normalised.
        log_p: of the model, normalised.
        target: token ids; -1 where there is none. None leaves out the three statistics that need one.

    Returns:
        {name: one number a row}; NaN where there is no target. All divergences are 0 where q = p.

    Raises:
        ValueError: a log-probability is NaN.

    Differs from the tuned-lens library (0.2.0): its `js_divergence` is (KL(p || q) + KL(q || p)) / 2, which has no
        upper bound, and its `total_variation` is the largest |p - q| of one token.

    Example:
        >>> import torch
        >>> apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).clamp(min=1e-30).log()
        >>> found = statistics(apart[:1], apart[1:])
        >>> round(float(found["js_divergence"]), 4), float(found["total_variation"])
        (0.6931, 1.0)
    """
    if log_q.isnan().any() or log_p.isnan().any():
        raise ValueError("a log-probability is NaN: look for the first activation that is not finite.")
    q, p = log_q.exp(), log_p.exp()
    apart = log_q - log_p
    found = {
        "entropy": -(q * log_q).sum(-1),
        "max_probability": q.amax(-1),
        "forward_kl": 0.0 - (p * apart).sum(-1),  # 0.0 - 0.0 has no sign
        "reverse_kl": (q * apart).sum(-1),
        # With m = p (1 + exp(apart)) / 2 nothing is divided by a probability that has underflowed to 0.
        "js_divergence": ((p + q) * (math.log(2) - F.softplus(apart)) + q * apart).sum(-1) / 2,
        "total_variation": (p - q).abs().sum(-1) / 2,
    }
    if target is not None:
        missing = target < 0
        own = log_q.gather(-1, target.clamp(min=0)[..., None])
        found["log_prob"] = own[..., 0].masked_fill(missing, math.nan)
        found["cross_entropy"] = -found["log_prob"]
        found["rank"] = ((log_q >= own).sum(-1) - 1).to(log_q.dtype).masked_fill(missing, math.nan)
    return found


def prediction_depth(found: Result) -> Result:
    """The first layer from which on the top token is the model's final one.

    With t_l the top token read from the stream before layer l, and t_L the model's own (L layers), the depth is the
    smallest d with t_l = t_L for all l from d to L: 0 where the embedding already has it, L where only the output does.

    Args:
        found: of `logit_lens` or `tuned_lens` with the site "resid_pre" and all layers.

    Returns:
        Result, unit "layers"; one row a prompt and position: prompt, component (the lens), pos, token (the final top
        token) and value.

    Raises:
        ValueError: a reading that lacks layers.

    Example:
        >>> import torch
        >>> from interp.lenses.logit import logit_lens
        >>> from interp.models import toy
        >>> model = toy.induction()
        >>> found = prediction_depth(logit_lens(model, torch.tensor([[2, 3, 4, 2]]), positions=-1))
        >>> found.table[["token", "value"]].values.tolist()  # the induction head is in the second of two layers
        [['w3', 2.0]]
    """
    n_layers = int(found.meta.get("n_layers", -1))
    own = (found.table["src"] == "resid_pre").to_numpy()
    if set(found.table.loc[own, "layer"]) != set(range(n_layers + 1)):
        raise ValueError(
            f"the prediction depth needs the stream before each layer and the output, and this result of "
            f'{found.method} does not have all: read with sites="resid_pre" and layers=None.'
        )
    table = found.table[own].assign(top=found.arrays["top_tokens"][1][own, 0])
    rows = []
    for (prompt, component, pos), group in table.groupby(["prompt", "component", "pos"], sort=True):
        ordered = group.sort_values("layer")
        top = ordered["top"].to_numpy()
        other = np.flatnonzero(top != top[-1])
        depth = float(other[-1] + 1) if len(other) else 0.0
        rows.append([prompt, component, pos, ordered["token"].iloc[-1], depth])
    depths = pd.DataFrame(rows, columns=["prompt", "component", "pos", "token", "value"])
    return Result("trajectory.prediction_depth", depths, "layers", meta=found.meta)
