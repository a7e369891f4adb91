"""What does a part of the stream add to the logits? The final norm with its scale held, the unembedding, and the parts.

Every vector that is written into the last position's stream goes to the logits through the same affine map: the final
norm, dividing by the scale of the true last stream, then the unembedding. Sums are taken in float32 at least.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from interp.core.batching import batches
from interp.models.model import Model
from interp.models.program import NoProgramError, Program
from interp.patching._inputs import require_decoder, where
from interp.tasks.task import Task

#: Vocabulary at once, where weights are not in float32 and have to be widened.
_VOCABULARY = 16384
#: Positions that are in memory together.
_TOKENS = 1024


class Frozen(NamedTuple):
    """The final norm with the scale of one stream a prompt, and the unembedding.

    `gain` and `bias` `[d_model]` and `centres` are the norm's; `scale` `[batch 1]`.
    """

    steps: Program
    gain: Tensor
    bias: Tensor
    centres: bool
    scale: Tensor

    def some(self, rows: slice) -> Frozen:
        """The same of some prompts."""
        return self._replace(scale=self.scale[rows])

    def pull(self, rows: Tensor) -> Tensor:
        """The directions u `[batch d_model]` after the norm as directions in the stream: v . result = u . norm(v)."""
        scaled = self.gain * rows.to(self.gain.dtype)
        return (scaled - scaled.mean(-1, keepdim=True) if self.centres else scaled) / self.scale

    def normed(self, vectors: Tensor) -> Tensor:
        """What the norm makes of parts `[batch n d_model]`, without its bias."""
        wide = vectors.to(self.gain.dtype)
        centred = wide - wide.mean(-1, keepdim=True) if self.centres else wide
        return centred * self.gain / self.scale[:, None]

    def change(self, vectors: Tensor) -> Tensor:
        """What parts `[batch n d_model]` add to all logits, `[batch n d_vocab]`."""
        return _product(self.normed(vectors), self._weight)

    def logits(self, streams: Tensor) -> Tensor:
        """Logits `[batch n d_vocab]` of streams `[batch n d_model]`, biases included."""
        linear = cast(Any, self.steps.unembed)
        found = _product(self.normed(streams) + self.bias, self._weight)
        return found if linear.bias is None else found + linear.bias.to(found.dtype)

    def expected(self, probabilities: Tensor) -> Tensor:
        """The unembedding's mean row `[n d_model]` under probabilities `[n d_vocab]`."""
        weight, dtype = self._weight, probabilities.dtype
        if weight.dtype == dtype:
            return probabilities @ weight
        cuts = batches(len(weight), _VOCABULARY)
        return torch.stack([probabilities[:, cut] @ weight[cut].to(dtype) for cut in cuts]).sum(0)

    def of_bias(self, rows: Tensor, biases: Tensor) -> Tensor:
        """What the biases of norm and unembedding add to logits: `[batch]` of rows `[batch d_model]` and biases."""
        return rows.to(self.bias.dtype) @ self.bias + biases.to(self.bias.dtype)

    @property
    def _weight(self) -> Tensor:
        return cast(Any, self.steps.unembed).weight.detach()


@torch.no_grad()
def frozen(steps: Program, final: Tensor) -> Frozen:
    """Hold the final norm's scale at that of a stream.

    Args:
        steps: of a model.
        final: the last layer's stream `[batch d_model]`.

    Returns:
        The Frozen.

    Raises:
        NoProgramError: a model that caps its logits, which then are no sum; or an unknown kind of final norm.
    """
    if steps.logit_cap is not None:
        raise NoProgramError(
            f"{steps.model.name} caps its logits at {steps.logit_cap:g} by a tanh, so that they are no sum of parts: "
            "direct attribution needs a model without (Llama, Qwen, GPT-2, Gemma 1, ...)."
        )
    norm = cast(nn.Module, steps.final_norm)
    wide = final.to(torch.promote_types(final.dtype, torch.float32))
    found = Frozen(steps, *linear_part(norm, final), _scale(norm, wide))
    theirs = norm(final).to(wide.dtype)
    off = (found.normed(final[:, None])[:, 0] + found.bias - theirs).abs().max()
    # The rounding of float32; bfloat16 keeps 8 bits.
    if not float(off) <= (1e-3 if final.dtype == torch.float32 else 0.05) * (1 + float(theirs.abs().max())):
        kind = type(norm).__name__
        raise NoProgramError(f"the final norm of {steps.model.name} is a {kind}, whose scale is unknown.")
    return found


def linear_part(module: object, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """What a norm does beside dividing by a scale: its gain and bias `[d_model]`, and whether it takes the mean off.

    Args:
        module: a LayerNorm or RMSNorm.
        like: streams `[n d_model]`, for their type and device.

    Returns:
        (gain, bias, centres), in float32 at least. Asked rather than read: norms differ in what their gain is relative
        to (Gemma's to 1).
    """
    norm = cast(nn.Module, module)
    probe = torch.ones_like(like[:1])  # its mean is 0 when half of it is negative
    probe[:, 1::2] = -1
    if probe.shape[-1] % 2:
        probe[:, -3:] = torch.tensor([1.0, 1.0, -2.0], dtype=probe.dtype, device=probe.device)
    # Large, so that the epsilon under the root is nothing beside it.
    probe = probe * max(1.0, 1e3 * _epsilon(norm) ** 0.5)
    wide = probe[0].to(torch.promote_types(probe.dtype, torch.float32))
    bias = norm(torch.zeros_like(probe))[0].to(wide.dtype)
    gain = (norm(probe)[0].to(wide.dtype) - bias) * _scale(norm, wide) / wide
    return gain, bias, isinstance(norm, nn.LayerNorm)


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _scale(norm: nn.Module, stream: Tensor) -> Tensor:
    centred = stream - stream.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else stream
    return (centred.pow(2).mean(-1, keepdim=True) + _epsilon(norm)).sqrt()


def _product(vectors: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == vectors.dtype:
        return vectors @ weight.T
    cuts = batches(len(weight), _VOCABULARY)
    return torch.cat([vectors @ weight[cut].to(vectors.dtype).T for cut in cuts], -1)


class Seen(NamedTuple):
    """What one pass has at one position of each prompt, by layer.

    `pre`, `mid`, `attn`, `mlp` `[layer batch d_model]`: the stream before the layer and after its attention, and what
    its attention and MLP write; `final` `[batch d_model]`; `pattern` `[layer batch head k_pos]`; `values`
    `[layer batch k_pos kv_head d_head]`, of all positions; `post` `[layer batch d_mlp]`.
    """

    pre: Tensor
    mid: Tensor
    attn: Tensor
    mlp: Tensor
    final: Tensor
    pattern: Tensor
    values: Tensor
    post: Tensor

    def weighted(self, layer: int) -> Tensor:
        """The coefficient of each attention neuron of a layer: attention times value, `[batch head k_pos d_head]`."""
        pattern, values = self.pattern[layer], self.values[layer]
        grouped = pattern.unflatten(1, (values.shape[2], -1))
        return torch.einsum("bgrk,bkgd->bgrkd", grouped, values).flatten(1, 2)


@torch.no_grad()
def seen_at(steps: Program, tokens: Tensor, mask: Tensor | None, at: Tensor) -> Seen:
    """What an unchanged run has at one position.

    Args:
        steps: of a model.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None.
        at: `[batch]`.

    Returns:
        The Seen. Cost: one forward pass without the unembedding.
    """
    frame, stream = steps.frame(tokens, mask), steps.embed(tokens, mask)
    rows = torch.arange(len(tokens), device=tokens.device)
    kept: dict[str, list[Tensor]] = {name: [] for name in Seen._fields if name != "final"}
    sites = {"pre": "resid_pre", "mid": "resid_mid", "attn": "attn_out", "mlp": "mlp_out", "post": "post"}
    for layer in range(len(steps.layers)):
        here = steps.layer(layer, stream, frame)
        for name, site in sites.items():
            kept[name].append(here[site][rows, at])
        kept["pattern"].append(here["pattern"][rows, :, at])
        kept["values"].append(here["v"])
        stream = here["resid_post"]
    return Seen(**{name: torch.stack(each) for name, each in kept.items()}, final=stream[rows, at])


def matrix(module: object) -> Tensor:
    """The weight of a linear map, `[in out]`."""
    linear = cast(Any, module)
    weight = linear.weight.detach()
    return weight if type(linear).__name__ == "Conv1D" else weight.T  # GPT-2 keeps [in out]


class Asked(NamedTuple):
    """Prompts, the position that is read `[batch]`, and the token whose logit is, with the one it is compared to."""

    task: Task
    at: Tensor
    target: Tensor
    wrong: Tensor | None


def asked(
    model: Model, steps: Program, task: Task | Tensor, pos: str | int | None, target: str | Tensor, *, compare: bool
) -> Asked:
    """What a question is about, refused where it is not clear.

    Args:
        model: a decoder.
        steps: its program.
        task: prompts, or token ids `[batch pos]`.
        pos: a name of the task or an index; None for "end", else the last.
        target: "answer", "wrong", "prediction", or ids `[batch]`.
        compare: whether the task's wrong answers are needed.

    Returns:
        The Asked.

    Raises:
        ValueError: what is missing.
    """
    require_decoder(model)
    if isinstance(task, Tensor):
        if task.ndim != 2 or not len(task):
            raise ValueError(f"tokens are {tuple(task.shape)}; give token ids [batch pos], at least one prompt.")
        names = tuple(f"prompt {i}" for i in range(len(task)))
        task = Task("tokens", names, task.to(model.device), "token ids given by the caller")
    if task.clean.shape[1] > model.n_ctx:
        raise ValueError(f"prompts of {task.clean.shape[1]} tokens: {model.name} has a context of {model.n_ctx}.")
    at = cast(Tensor, where(task, task.positions.get("end", -1) if pos is None else pos))
    if task.mask is not None and bool((task.mask.gather(1, at[:, None]) == 0).any()):
        raise ValueError(f"task {task.name!r}: position {pos!r} is padding in a prompt; read a token, as pos='end'.")
    if compare and task.wrong is None:
        raise ValueError(f"task {task.name!r} has no wrong answers to compare with: take quantity='logit'.")
    return Asked(task, at, _target(model, steps, task, at, target), task.wrong if compare else None)


def _target(model: Model, steps: Program, task: Task, at: Tensor, target: str | Tensor) -> Tensor:
    if isinstance(target, Tensor):
        found = target.to(model.device)
        if found.shape != (len(task),) or int(found.min()) < 0 or int(found.max()) >= model.d_vocab:
            raise ValueError(
                f"target is {tuple(found.shape)}, ids {found.flatten()[:3].tolist()}...; give one token id of 0 to "
                f"{model.d_vocab - 1} for each of {len(task)} prompts."
            )
        return found
    if target == "prediction":
        return predictions(steps, task, at)
    if target not in ("answer", "wrong"):
        raise ValueError(f"target={target!r}: use 'answer', 'wrong', 'prediction', or token ids [batch].")
    listed = task.answers if target == "answer" else task.wrong
    if listed is None:
        raise ValueError(f"task {task.name!r} has no {target}s: take target='prediction', or give ids [batch].")
    return listed


@torch.no_grad()
def predictions(steps: Program, task: Task, at: Tensor) -> Tensor:
    """The most probable next token after one position, `[batch]`."""
    found = []
    for rows in batches(len(task), prompts_at_once(task)):
        mask = None if task.mask is None else task.mask[rows]
        frame, stream = steps.frame(task.clean[rows], mask), steps.embed(task.clean[rows], mask)
        for layer in range(len(steps.layers)):
            stream = steps.layer(layer, stream, frame)["resid_post"]
        last = stream[torch.arange(len(stream), device=stream.device), at[rows]]
        found.append(steps.logits(last).argmax(-1))
    return torch.cat(found)


def prompts_at_once(task: Task) -> int:
    """How many prompts are in memory together."""
    return max(1, _TOKENS // task.clean.shape[1])
