"""What would the model say if it stopped at this layer? The logit lens: the model's own output map, applied midway.

The logit lens has no paper; nostalgebraist described it ("interpreting GPT: the logit lens", 2020). The paper of the
tuned lens (arXiv:2303.08112) defines it as used here, and measures where it fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from interp.core.registry import method
from interp.core.result import Result
from interp.lenses._reading import Positions, Target, read, where_read
from interp.models.model import Model
from interp.tasks.task import Task


@method(name="Logit lens", paper="arXiv:2303.08112", notebook="attention_lens")
def logit_lens(
    model: Model,
    task: Task | Tensor,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    sites: str | Sequence[str] = "resid_pre",
    target: Target = "next",
    k: int = 10,
) -> Result:
    """What each layer's stream says about the next token, read by the model's own final norm and unembedding.

    At layer l and a position with the vector h `[d_model]` (the stream before the layer, or what its attention or MLP
    writes), the lens's distribution is

        q = softmax(W_U^T norm(h) + b_U)

    with the final norm's scale taken from h itself, and the cap on logits where the model has one. It is compared with
    the model's own p, the same of the last stream. The lens of the output is p exactly. What a part *adds* to the
    logits, with the scale of the last stream, is another question: `interp.flow.attribution.attribute`.

    Args:
        model: a decoder, of raw or processed weights (log-probabilities of the stream are the same).
        task: prompts, or token ids `[batch pos]`.
        layers: of each site; None for all. For "resid_pre" the layer after the last is the model's output.
        positions: names of the task or indices; None for all that are no padding.
        sites: one or several of "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out".
        target: what `value` is the log-probability of: "next", the token that follows, and at the last position the
            task's answer where it has answers; "answer", at every position; or token ids `[batch]`.
        k: top tokens kept.

    Returns:
        Result, unit "nats"; one row a prompt, site, layer and position: prompt, component (the lens: "logit"), src (the
        site), layer, pos, token (the top one), target, value (log-probability of the target), value_cross_entropy
        (minus that), value_rank (of the target, 0 for the top, ties against it), value_entropy, value_max_probability,
        and against the model's output value_forward_kl (KL(p || q)), value_reverse_kl, value_js_divergence and
        value_total_variation; formulas and units are in `meta["units"]`. NaN where a position has no target. Arrays:
        "top_tokens" (ids) and "top_log_probs" `[row rank]`, rows as in the table.

    Raises:
        ValueError: not a decoder; an unknown site, layer, position or target; ids that the model has not; a model whose
            logits are not its final norm and unembedding of its last stream; activations that are not finite.

    Cost: one forward pass without the unembedding; then 2 d_model d_vocab FLOPs for each row and about ten passes over
        its logits. Memory: the vectors read of 1,024 positions, and about ten tiles of 16 MB of logits, however many
        layers and positions.

    Example:
        >>> from interp.models import toy
        >>> model = toy.induction()
        >>> found = logit_lens(model, model.tokenize("w2 w3 w4 w2").ids, positions=-1)
        >>> found.filter(layer=2).table["token"].tolist()  # the second and last layer has the induction head
        ['w3']
    """
    where = where_read(model, sites, layers)
    options = {"sites": list(dict.fromkeys(place.site for place in where)), "layers": list(layers or [])}
    return read(
        model, task, "logit", lambda layer, h: h, where=where, positions=positions, target=target, k=k,
        method="logit.logit_lens", **options,
    )  # fmt: skip
