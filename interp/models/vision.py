"""How does a Hugging Face vision transformer get TransformerLens's hook names?

TransformerLens loads language models only. `VisionEncoder` wraps a vision transformer that is
already in memory and gives it the hook points that the methods ask for, so that `hooks.run`, and
every method that reads the residual stream through it, works on images as it does on text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers import AttentionInterface

from interp.models.model import Model

#: Name under which the attention with hook points is registered with transformers.
_ATTENTION = "interp_hooked"
#: Attribute of an attention module that holds its hook points.
_POINTS = "interp_hook_points"


def is_vision(module: nn.Module) -> bool:
    """Whether a module is a vision transformer that `VisionEncoder` can wrap.

    Args:
        module: anything in memory.

    Returns:
        True for a Hugging Face model that takes `pixel_values`, cuts them into patches by one convolution and sends
        all tokens through blocks of one width (ViT, DeiT, DINOv2, DINOv2 with registers, DINOv3, the vision tower of
        CLIP and SigLIP, and these with a head on top). False for a language model, for a model with two towers (pass
        its `vision_model`), for hierarchical or convolutional ones, and for those that drop random patches.
    """
    return getattr(module, "main_input_name", None) == "pixel_values" and _find_trunk(module) is not None


class VisionEncoder(nn.Module):
    """A vision transformer with hook points.

    `hook_dict` holds, for each layer, `blocks.{layer}.hook_resid_pre` and `blocks.{layer}.hook_resid_post`
    (`[batch pos d_model]`, what goes into a block and comes out of it, before any final norm) and, where the model uses
    transformers' attention interface, `blocks.{layer}.attn.hook_q`, `hook_k`, `hook_v`, `hook_z`
    (`[batch pos head d_head]`) and `hook_pattern` (`[batch head q_pos k_pos]`, after the softmax). A value that a hook
    returns replaces the activation for all that follows.

    Wrapping puts the module in evaluation mode and, for the attention hooks, switches its attention to one that
    computes the pattern explicitly; weights are neither copied nor changed. A head on top (a classifier) is not part of
    the wrapper's output; call `encoder.module(pixels)` for it: the hooks fire there too.

    Attributes:
        module: the module that was wrapped, head included.
        hook_dict: {name: HookPoint}.
    """

    def __init__(self, module: nn.Module) -> None:
        """Attach the hook points.

        Args:
            module: a module for which `is_vision` is true.

        Raises:
            ValueError: for any other module.
        """
        super().__init__()
        trunk = _trunk(module)
        self.module: Any = module.eval()
        self.hook_dict: dict[str, HookPoint] = {}
        for layer, block in enumerate(_blocks(trunk)):
            self._attach_residual(block, layer)
            self._attach_attention(block, layer)
        if getattr(module, "_supports_attention_backend", False):
            AttentionInterface.register(_ATTENTION, _hooked_attention)
            self.module.set_attn_implementation(_ATTENTION)

    def forward(self, pixels: Tensor) -> Tensor:
        """Run the encoder.

        Args:
            pixels: images `[batch channel height width]`, normalised as the model's own image processor does.

        Returns:
            Hugging Face's `last_hidden_state`, `[batch pos d_model]`: after the final norm for ViT, DeiT, SigLIP and
            the DINOs, before it for CLIP, which norms only its pooled token. What the last block wrote is at
            `blocks.{n_layers - 1}.hook_resid_post` for all of them.

        Raises:
            ValueError: for a tensor that is not a batch of images.
        """
        if pixels.ndim != 4 or not pixels.is_floating_point():
            raise ValueError(
                f"a vision model needs floating-point pixels [batch channel height width], but got {pixels.dtype} of "
                f"shape {list(pixels.shape)}: use the model's image processor (for one image, add the batch axis)."
            )
        return _trunk(self.module)(pixel_values=pixels).last_hidden_state

    def token_names(self, size: tuple[int, int] | None = None) -> list[str]:
        """What each position of the sequence stands for; see the function `token_names`."""
        return token_names(self.module, size)

    def _point(self, name: str) -> HookPoint:
        point = HookPoint()
        point.name = name
        self.hook_dict[name] = point
        return point

    def _attach_residual(self, block: nn.Module, layer: int) -> None:
        before = self._point(f"blocks.{layer}.hook_resid_pre")
        after = self._point(f"blocks.{layer}.hook_resid_post")

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (before(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": before(kwargs["hidden_states"])}

        def leave(_module: nn.Module, _args: tuple, output: Any) -> Any:
            # Blocks return a tensor in some versions and families, a tuple in others.
            return (after(output[0]), *output[1:]) if isinstance(output, tuple) else after(output)

        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)

    def _attach_attention(self, block: nn.Module, layer: int) -> None:
        # `is_causal` is what transformers' attention interface reads, so the modules that use it have it.
        found = [m for m in block.modules() if hasattr(m, "is_causal")]
        if getattr(self.module, "_supports_attention_backend", False) and len(found) == 1:
            points = {
                label: self._point(f"blocks.{layer}.attn.hook_{label}") for label in ("q", "k", "v", "pattern", "z")
            }
            setattr(found[0], _POINTS, points)


def describe(module: nn.Module) -> dict[str, Any]:
    """The shapes of a vision transformer, under the names that `Model` has for them.

    Args:
        module: a module for which `is_vision` is true.

    Returns:
        n_layers, n_heads, n_key_value_heads, d_model, d_head, d_mlp, d_vocab (0: it has no unembedding), n_ctx (tokens
        of an image of the size in its config, CLS and registers included), gated_mlp and causal (False).

    Raises:
        ValueError: for a module that is not such a model.
    """
    trunk = _trunk(module)
    config = trunk.config
    writers = [
        m for m in _blocks(trunk)[0].modules() if isinstance(m, nn.Linear) and m.out_features == config.hidden_size
    ]
    return {
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        # Not every config says it (DINOv2 derives it): the MLP's last matrix does.
        "d_mlp": getattr(config, "intermediate_size", None) or writers[-1].in_features,
        "d_vocab": 0,
        "n_ctx": len(token_names(module)),
        "gated_mlp": bool(getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False)),
        "causal": False,
    }


def load_vision(module: nn.Module, name: str, *, fingerprint: str) -> Model:
    """A vision transformer in memory as a `Model`.

    Args:
        module: a module for which `is_vision` is true; wrapped, not copied.
        name: what Results call it.
        fingerprint: SHA-256 over its config and weights.

    Returns:
        A Model of kind "vision" with raw weights and no tokenizer; its input is pixels `[batch channel height width]`.

    Raises:
        ValueError: for a module that is not such a model.
    """
    shapes = describe(module)
    return Model(
        bridge=VisionEncoder(module),
        name=name,
        kind="vision",
        weights="raw",
        fingerprint=fingerprint,
        tokenizer=None,
        **shapes,
    )


def token_names(module: nn.Module, size: tuple[int, int] | None = None) -> list[str]:
    """What each position of a vision transformer's sequence stands for.

    Args:
        module: a module for which `is_vision` is true.
        size: (height, width) of the images in pixels; None for the size in the model's config. (DINOv2's config says
            518, while its image processor cuts to 224: pass `pixels.shape[-2:]`.)

    Returns:
        One name a position: "CLS", "distillation", "register 0" ..., "patch 0,0", "patch 0,1" ... by rows.

    Raises:
        ValueError: for a module that is not such a model.
    """
    trunk = _trunk(module)
    embeddings = trunk.embeddings
    names = ["CLS"] if hasattr(embeddings, "cls_token") or hasattr(embeddings, "class_embedding") else []
    if hasattr(embeddings, "distillation_token"):
        names.append("distillation")
    registers = getattr(embeddings, "register_tokens", None)
    names += [f"register {index}" for index in range(0 if registers is None else registers.shape[1])]
    if size is None:
        side = trunk.config.image_size
        size = (side, side) if isinstance(side, int) else (side[0], side[1])
    patch = next(m for m in embeddings.modules() if isinstance(m, nn.Conv2d)).kernel_size
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    return names + [f"patch {row},{column}" for row in range(rows) for column in range(columns)]


def toy_vit(
    *,
    token: str = "register 1",
    layer: int = 1,
    feature: int = 7,
    size: float = 1000.0,
    n_layers: int = 4,
    seed: int = 0,
) -> nn.Module:
    """A small random DINOv2 with two registers, in which one residual feature is inflated at one token.

    One neuron of block `layer` recognises the token by a mark in its embedding, which nothing else reads or writes, and
    adds `size` to the feature there. So before that block nothing is inflated, and from its output on exactly this
    (token, feature) is: the planted truth for methods that look for massive activations.

    Args:
        token: a name that `token_names` gives, for example "CLS", "register 0" or "patch 2,3".
        layer: block that writes the feature.
        feature: which of the 32 dimensions of the residual stream.
        size: value written, exact up to the variation of the token's norm between images (a few percent).
        n_layers: number of blocks.
        seed: seed of the weights.

    Returns:
        A `Dinov2WithRegistersModel` for images of 16 x 16 pixels in patches of 4.

    Raises:
        ValueError: for a token, layer or feature that the toy does not have.
    """
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    d_model, mark = 32, 31
    config = Dinov2WithRegistersConfig(
        hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=4, mlp_ratio=4,
        image_size=16, patch_size=4, num_register_tokens=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # building draws weights from the global generator: leave it as it was
        module: Any = Dinov2WithRegistersModel(config).eval()
    names = token_names(module)
    if token not in names or not 0 <= layer < n_layers or not 0 <= feature < mark:
        raise ValueError(
            f"token {token!r}, layer {layer}, feature {feature}: the toy has tokens {', '.join(names)}; layers 0 to "
            f"{n_layers - 1}; features 0 to {mark - 1} ({mark} carries the mark)."
        )
    generator = torch.Generator().manual_seed(seed)
    embeddings, blocks = module.embeddings, module.encoder.layer
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for embedding in (embeddings.cls_token, embeddings.register_tokens, embeddings.position_embeddings):
            embedding[..., mark] = 0
        embeddings.patch_embeddings.projection.weight[mark] = 0
        for block in blocks:
            block.attention.o_proj.weight[mark] = 0
            block.mlp.fc2.weight[mark] = 0
        kind, _, where = token.partition(" ")
        if kind == "CLS":
            embeddings.cls_token[0, 0, mark] = 8
        elif kind == "register":
            embeddings.register_tokens[0, int(where), mark] = 8
        else:  # the position embeddings have CLS and the patches, but no registers
            embeddings.position_embeddings[0, names.index(token) - config.num_register_tokens, mark] = 8
        _plant_neuron(module, blocks[layer].mlp, names.index(token), mark, feature, size)
    return module


def _plant_neuron(module: nn.Module, mlp: Any, pos: int, mark: int, feature: int, size: float) -> None:
    # After the norm the mark is about 5 at its token and within 1 of zero elsewhere: the neuron is on only there.
    mlp.fc1.weight[0], mlp.fc1.bias[0] = 0, -25
    mlp.fc1.weight[0, mark] = 10
    mlp.fc2.weight[:, 0] = 0
    seen: list[Tensor] = []
    handle = mlp.fc2.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, pos, 0]))
    module(torch.zeros(1, 3, 16, 16))
    handle.remove()
    mlp.fc2.weight[feature, 0] = size / seen[0]


def _hooked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, written out so that every step passes its hook point; `[batch head pos d_head]` in."""
    points = getattr(module, _POINTS, {})

    def pass_by(label: str, activation: Tensor) -> Tensor:
        return points[label](activation) if label in points else activation

    query, key, value = (
        pass_by(label, activation.transpose(1, 2)).transpose(1, 2)
        for label, activation in (("q", query), ("k", key), ("v", value))
    )
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = pass_by("pattern", scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    z = pass_by("z", (nn.functional.dropout(pattern, dropout, module.training) @ value).transpose(1, 2))
    return z.contiguous(), pattern


def _find_trunk(module: nn.Module) -> Any:
    """The part that embeds the patches and holds the blocks, or None."""
    for candidate in module.modules():
        config, embeddings = getattr(candidate, "config", None), getattr(candidate, "embeddings", None)
        if getattr(candidate, "main_input_name", None) != "pixel_values" or not isinstance(embeddings, nn.Module):
            continue
        if hasattr(candidate, "out_features") or hasattr(config, "mask_ratio"):
            continue  # a backbone returns feature maps; a masked autoencoder drops random patches
        patches = any(isinstance(m, nn.Conv2d) for m in embeddings.modules())
        uniform = all(isinstance(getattr(config, key, None), int) for key in ("hidden_size", "num_attention_heads"))
        if patches and uniform and _blocks(candidate) is not None:
            return candidate
    return None


def _trunk(module: nn.Module) -> Any:
    trunk = _find_trunk(module)
    if trunk is None:
        raise ValueError(
            f"{type(module).__name__} is not a vision transformer that can be wrapped: needed is a Hugging Face model "
            "that takes pixel_values and has patch embeddings and blocks of one width, such as ViTModel, "
            "Dinov2WithRegistersModel or CLIPVisionModel (of a model with two towers, pass `.vision_model`)."
        )
    return trunk


def _blocks(trunk: Any) -> Any:
    lists = (m for m in trunk.modules() if isinstance(m, nn.ModuleList))
    return next((blocks for blocks in lists if 0 < len(blocks) == trunk.config.num_hidden_layers), None)
