"""What does a decoder compute, layer by layer? Its steps as plain functions of tensors, without hooks.

A bridge runs whole forward passes. Rerunning a part of one (some rows, some positions, from some layer on) needs the
steps between the hooks one by one; here they are, for the decoders that transformers writes in the one common form:
norm, queries / keys / values, rotary or learned positions, causal attention with grouped keys, an output map, an MLP
with or without a gate, in sequence or in parallel. They read the bridge's own weights, so they are the same model; the
first call on a model compares their logits with the bridge's and refuses if they differ.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.models.hooks import run
from interp.models.model import Model

#: Components that a step reads or writes, in the order in which a layer computes them. Hook names by `hook_name`.
SITES = (
    "resid_pre", "q", "k", "v", "attn_scores", "pattern", "z", "attn_out", "resid_mid", "post", "mlp_out", "resid_post",
)  # fmt: skip


class NoProgramError(NotImplementedError):
    """The architecture has a step that is not written here."""


class Frame(NamedTuple):
    """What attention needs to know of the positions of a batch.

    `rotary` is None or (cos, sin), each `[batch pos rotary_dim]`; `allowed` is `[batch q_pos k_pos]`, True where a
    query may look; `windowed` the same for layers with a sliding window.
    """

    rotary: tuple[Tensor, Tensor] | None
    allowed: Tensor
    windowed: Tensor | None


@dataclass(frozen=True)
class Layer:
    """The modules of one layer, out of their wrappers."""

    ln1: Callable[[Tensor], Tensor]
    ln2: Callable[[Tensor], Tensor]
    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    o: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor] | None
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    windowed: bool
    #: Norms of Qwen 3 on each query and key, and of Gemma 2 on what attention and MLP write; nothing elsewhere.
    q_norm: Callable[[Tensor], Tensor]
    k_norm: Callable[[Tensor], Tensor]
    attn_post: Callable[[Tensor], Tensor]
    mlp_post: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Program:
    """A decoder's steps. Any number of leading axes goes through all but attention.

    Attributes:
        layers: the modules of each.
        parallel: whether the MLP reads the layer's input (GPT-NeoX) and not the stream after attention.
        n_heads, n_key_value_heads, d_head: of the attention.
        scale: factor of the attention scores.
        heads_add: whether attention's output is the sum of its heads' (not where a norm comes after it, Gemma 2).
        score_cap, logit_cap: c of c tanh(x / c), which Gemma 2 applies to attention scores and logits; None for none.
    """

    model: Model
    layers: tuple[Layer, ...]
    parallel: bool
    n_heads: int
    n_key_value_heads: int
    d_head: int
    scale: float
    act: Callable[[Tensor], Tensor]
    final_norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]
    window: int | None
    heads_add: bool
    score_cap: float | None
    logit_cap: float | None

    def embed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The stream before layer 0, `[batch pos d_model]`, from token ids `[batch pos]`."""
        bridge = self.model.bridge
        stream = bridge.embed.original_component(tokens)
        if hasattr(bridge, "pos_embed"):
            table = bridge.pos_embed.original_component
            stream = stream + table.weight[_positions(tokens, mask) + getattr(table, "offset", 0)]
        return stream

    def frame(self, tokens: Tensor, mask: Tensor | None = None) -> Frame:
        """Positions and who sees whom, for token ids `[batch pos]` and their mask."""
        positions = _positions(tokens, mask)
        rotary = None
        if hasattr(self.model.bridge, "rotary_emb"):
            like = torch.empty(0, dtype=self.model.dtype, device=tokens.device)
            rotary = self.model.bridge.rotary_emb.original_component(like, positions)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        causal = index[:, None] >= index[None, :]
        seen = causal[None] if mask is None else causal[None] & mask.bool()[:, None, :]
        seen = seen | torch.eye(len(index), dtype=torch.bool, device=tokens.device)  # padding sees itself: no empty row
        seen = seen.expand(len(tokens), -1, -1)
        near = None
        if self.window is not None:
            near = seen & (index[:, None] - index[None, :] < self.window)
        return Frame(rotary, seen, near)

    def allowed(self, layer: int, frame: Frame) -> Tensor:
        """Who sees whom in one layer, `[batch q_pos k_pos]`."""
        return frame.windowed if self.layers[layer].windowed and frame.windowed is not None else frame.allowed

    def queries(self, layer: int, normed: Tensor) -> Tensor:
        """`hook_q` `[... head d_head]` of the normed stream."""
        return self.layers[layer].q(normed).unflatten(-1, (self.n_heads, self.d_head))

    def keys(self, layer: int, normed: Tensor) -> Tensor:
        """`hook_k` `[... kv_head d_head]` of the normed stream, before any rotation."""
        return self.layers[layer].k(normed).unflatten(-1, (self.n_key_value_heads, self.d_head))

    def values(self, layer: int, normed: Tensor) -> Tensor:
        """`hook_v` `[... kv_head d_head]` of the normed stream."""
        return self.layers[layer].v(normed).unflatten(-1, (self.n_key_value_heads, self.d_head))

    def rotate(self, heads: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rotate queries or keys `[... pos head d_head]` by (cos, sin) `[... pos rotary_dim]`."""
        if rotary is None:
            return heads
        cos, sin = (part.unsqueeze(-2) for part in rotary)
        width = cos.shape[-1]
        turned = heads if width == heads.shape[-1] else heads[..., :width]
        half = width // 2
        swapped = torch.cat((-turned[..., half:], turned[..., :half]), -1)
        turned = turned * cos + swapped * sin
        return turned if width == heads.shape[-1] else torch.cat((turned, heads[..., width:]), -1)

    def rotated_q(self, layer: int, queries: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries as attention reads them: normed where the architecture does so (Qwen 3), then rotated."""
        return self.rotate(self.layers[layer].q_norm(queries), rotary)

    def rotated_k(self, layer: int, keys: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Keys as attention reads them, as `rotated_q`."""
        return self.rotate(self.layers[layer].k_norm(keys), rotary)

    def scores(self, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """`hook_attn_scores` `[batch head q_pos k_pos]`, -inf where a query may not look.

        Args:
            queries: rotated, `[batch q_pos head d_head]`.
            keys: rotated, `[batch k_pos kv_head d_head]`.
            allowed: `[batch q_pos k_pos]`.
        """
        grouped = queries.unflatten(-2, (self.n_key_value_heads, -1))
        scores = self.capped(torch.einsum("bqgrd,bkgd->bgrqk", grouped, keys).flatten(1, 2) * self.scale)
        return scores.masked_fill(~allowed[:, None], float("-inf"))

    def capped(self, scores: Tensor) -> Tensor:
        """Attention scores, softly bounded where the architecture does so."""
        return _capped(scores, self.score_cap)

    def pattern(self, scores: Tensor) -> Tensor:
        """`hook_pattern`: the softmax of the scores over keys, in float32."""
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)

    def mix(self, pattern: Tensor, values: Tensor) -> Tensor:
        """`hook_z` `[batch q_pos head d_head]` of a pattern `[batch head q_pos k_pos]` and values."""
        grouped = pattern.unflatten(1, (self.n_key_value_heads, -1))
        return torch.einsum("bgrqk,bkgd->bqgrd", grouped, values).flatten(2, 3)

    def attn_out(self, layer: int, z: Tensor) -> Tensor:
        """`hook_attn_out` `[... d_model]` of `hook_z` `[... head d_head]`."""
        return self.layers[layer].attn_post(self.layers[layer].o(z.flatten(-2)))

    def w_o(self, layer: int) -> Tensor:
        """The output map `[head d_head d_model]`; what head h writes is `z[..., h, :] @ w_o[h]`, without the bias.

        Raises:
            NoProgramError: where heads do not add up (`heads_add`).
        """
        if not self.heads_add:
            raise NoProgramError(f"{self.model.name} normalises attention's output: no head writes a part of its own.")
        linear: Any = self.layers[layer].o
        stored = linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T  # GPT-2 keeps [in out]
        return stored.unflatten(0, (self.n_heads, self.d_head))

    def post(self, layer: int, stream: Tensor) -> Tensor:
        """`mlp.hook_post` `[... d_mlp]` of what the MLP reads (`resid_mid`; `resid_pre` where parallel)."""
        modules = self.layers[layer]
        normed = modules.ln2(stream)
        if modules.gate is None:
            return self.act(modules.up(normed))
        return self.act(modules.gate(normed)) * modules.up(normed)

    def mlp_out(self, layer: int, post: Tensor) -> Tensor:
        """`hook_mlp_out` `[... d_model]` of `mlp.hook_post`."""
        return self.layers[layer].mlp_post(self.layers[layer].down(post))

    def layer(self, layer: int, stream: Tensor, frame: Frame) -> dict[str, Tensor]:
        """Every site of one layer `[batch pos ...]` from its input: the slow, obvious use of the steps.

        Besides `SITES`, "rotated_k" are the keys as attention reads them. In a parallel layer "resid_mid" is what no
        hook shows: the input plus attention's output.
        """
        seen: dict[str, Tensor] = {"resid_pre": stream}
        normed = self.layers[layer].ln1(stream)
        seen["q"], seen["k"], seen["v"] = (f(layer, normed) for f in (self.queries, self.keys, self.values))
        seen["rotated_k"] = self.rotated_k(layer, seen["k"], frame.rotary)
        rotated_q = self.rotated_q(layer, seen["q"], frame.rotary)
        seen["attn_scores"] = self.scores(rotated_q, seen["rotated_k"], self.allowed(layer, frame))
        seen["pattern"] = self.pattern(seen["attn_scores"])
        seen["z"] = self.mix(seen["pattern"], seen["v"])
        seen["attn_out"] = self.attn_out(layer, seen["z"])
        seen["resid_mid"] = stream + seen["attn_out"]
        seen["post"] = self.post(layer, stream if self.parallel else seen["resid_mid"])
        seen["mlp_out"] = self.mlp_out(layer, seen["post"])
        seen["resid_post"] = seen["resid_mid"] + seen["mlp_out"]
        return seen

    def logits(self, stream: Tensor) -> Tensor:
        """Logits `[... d_vocab]` of the stream after the last layer."""
        return _capped(self.unembed(self.final_norm(stream)), self.logit_cap)

    def logits_of(self, stream: Tensor, tokens: Tensor) -> Tensor:
        """Logits `[... batch k]` of a few tokens `[batch k]` of each prompt, of streams `[... batch d_model]`."""
        rows, bias = self.directions(tokens)
        return _capped(torch.einsum("...bd,bkd->...bk", self.final_norm(stream), rows) + bias, self.logit_cap)

    def directions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the unembedding and their bias: `[... d_model]` and `[...]` of token ids `[...]`."""
        linear = self.model.bridge.unembed.original_component
        bias = getattr(linear, "bias", None)
        rows = linear.weight[tokens]
        return rows, (rows.new_zeros(tokens.shape) if bias is None else bias[tokens])


def hook_name(site: str, layer: int) -> str:
    """TransformerLens's name of a site.

    Args:
        site: one of `SITES`.
        layer: counted from 0.

    Returns:
        For example "blocks.3.attn.hook_z".
    """
    if site not in SITES:
        raise ValueError(f"site {site!r} is not known; use one of {', '.join(SITES)}.")
    part = {"post": "mlp."}.get(site, "attn." if site in ("q", "k", "v", "attn_scores", "pattern", "z") else "")
    return f"blocks.{layer}.{part}hook_{site}"


_KNOWN: weakref.WeakKeyDictionary[Any, Program | str] = weakref.WeakKeyDictionary()


def program(model: Model) -> Program:
    """The steps of a model, checked against its own forward pass.

    Args:
        model: a decoder.

    Returns:
        The Program; the same one at each call.

    Raises:
        NoProgramError: the architecture is not of the common form, or its logits came out different; the message says
            which.

    Cost: the first call runs two forward passes of a few tokens.
    """
    known = _KNOWN.get(model.bridge)
    if known is None:
        try:
            known = _build(model)
            _check(known)
        except (NoProgramError, AttributeError, KeyError, TypeError, RuntimeError, ValueError, IndexError) as error:
            known = f"{type(error).__name__}: {error}"
        _KNOWN[model.bridge] = known
    if isinstance(known, str):
        raise NoProgramError(f"{model.name} has no layer-by-layer program ({known}).")
    return known


def _positions(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _build(model: Model) -> Program:
    bridge = model.bridge
    if model.kind != "decoder" or not hasattr(bridge, "original_model"):
        raise NoProgramError(f"it is a {type(bridge).__name__} of a {model.kind}, not a TransformerBridge of a decoder")
    config = bridge.original_model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", None):
        raise NoProgramError("its config sets scale_attn_by_inverse_layer_idx")
    unknown = [name for name, _ in bridge.blocks[0].named_children() if name not in _BLOCK_PARTS]
    if unknown:
        raise NoProgramError(f"its layers have {', '.join(unknown)}")
    first = bridge.blocks[0]
    kinds = getattr(config, "layer_types", None) or [None] * model.n_layers
    window = getattr(config, "sliding_window", None)
    if hasattr(config, "use_sliding_window") and not config.use_sliding_window:
        window = None
    layers = []
    for block, kind in zip(bridge.blocks, kinds, strict=True):
        gate = getattr(block.mlp, "gate", None)
        layers.append(
            Layer(
                ln1=block.ln1.original_component,
                ln2=getattr(block, "ln2", block.ln1).original_component,  # Phi has one norm for both
                q=block.attn.q.original_component,
                k=block.attn.k.original_component,
                v=block.attn.v.original_component,
                o=block.attn.o.original_component,
                gate=None if gate is None else gate.original_component,
                up=getattr(block.mlp, "in").original_component,
                down=block.mlp.out.original_component,
                windowed=window is not None and kind in (None, "sliding_attention"),
                q_norm=_norm(block.attn, "q_norm"),
                k_norm=_norm(block.attn, "k_norm"),
                attn_post=_norm(block, "ln1_post"),
                mlp_post=_norm(block, "ln2_post"),
            )
        )
    acts = [getattr(first.mlp.original_component, name, None) for name in ("act_fn", "act", "activation_fn")]
    return Program(
        model=model,
        layers=tuple(layers),
        parallel=bool(getattr(config, "use_parallel_residual", False)) or not hasattr(first, "ln2"),
        n_heads=model.n_heads,
        n_key_value_heads=model.n_key_value_heads,
        d_head=model.d_head,
        scale=float(first.attn.original_component.scaling),
        act=next(act for act in acts if act is not None),
        final_norm=bridge.ln_final.original_component,
        unembed=bridge.unembed.original_component,
        window=window,
        heads_add=not hasattr(first, "ln1_post"),
        score_cap=getattr(config, "attn_logit_softcapping", None),
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def _norm(parent: Any, name: str) -> Callable[[Tensor], Tensor]:
    """A norm that only some architectures have, or nothing."""
    found = getattr(parent, name, None)
    return _unchanged if found is None else found.original_component


def _unchanged(stream: Tensor) -> Tensor:
    return stream


def _capped(values: Tensor, cap: float | None) -> Tensor:
    return values if cap is None else cap * torch.tanh(values / cap)


_BLOCK_PARTS = (
    "hook_in", "hook_out", "hook_mlp_in", "_original_component", "ln1", "ln1_post", "ln2", "ln2_post", "attn", "mlp",
)  # fmt: skip


def _check(steps: Program) -> None:
    """Compare with the bridge on two prompts, one of them padded and longer than a window where that is cheap."""
    model = steps.model
    length = 12 if steps.window is None or steps.window > 64 else min(steps.window + 4, model.n_ctx)
    tokens = (torch.arange(2 * length, device=model.device).view(2, length) * 7919 + 5) % model.d_vocab
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    theirs = run(model, tokens, mask=mask).logits.float().log_softmax(-1)
    with torch.no_grad():
        ours = forward(steps, tokens, mask)[0].float().log_softmax(-1)
    gap = float(((ours - theirs).abs() * mask[..., None]).max())
    # Float32 sums taken in another order differ by about 1e-5 over tens of layers; bfloat16 keeps 8 bits.
    tolerance = 2e-3 if model.dtype == torch.float32 else 0.5
    if not gap <= tolerance:
        raise NoProgramError(f"its log-probabilities came out {gap:.2g} nats off the bridge's")


def forward(
    steps: Program, tokens: Tensor, mask: Tensor | None = None, *, capture: tuple[str, ...] = ()
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """A whole forward pass by the program's steps: the slow, obvious use of them.

    Args:
        steps: of a model.
        tokens: `[batch pos]`.
        mask: `[batch pos]`, or None.
        capture: sites to keep, for all layers; "rotated_k" keeps the keys as attention reads them.

    Returns:
        Logits `[batch pos d_vocab]`, and {(site, layer): activation}, shaped as the hook of that name has it.

    Cost: one forward pass; memory for what is captured.
    """
    frame = steps.frame(tokens, mask)
    stream = steps.embed(tokens, mask)
    cache: dict[tuple[str, int], Tensor] = {}
    for layer in range(len(steps.layers)):
        seen = steps.layer(layer, stream, frame)
        stream = seen["resid_post"]
        cache.update({(site, layer): seen[site] for site in capture})
    return steps.logits(stream), cache
