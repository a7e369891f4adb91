"""What is a loaded model? The bridge, its shapes, its tokenizer, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from interp.models.hooks import nearest

Weights = Literal["processed", "raw"]
Kind = Literal["decoder", "encoder", "vision"]


class Tokens(NamedTuple):
    """A batch of token ids and the mask that says which of them are real.

    `ids` and `mask` are `[batch pos]`; `mask` is 1 on tokens and 0 on padding.
    """

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Model:
    """A transformer with TransformerLens's hook names, whatever it was loaded from.

    Attributes:
        bridge: the TransformerBridge or HookedTransformer that runs (a `VisionEncoder` for vision models).
        name: what was asked for.
        kind: "decoder", "encoder" or "vision".
        weights: "processed" (LayerNorm folded, writing weights and unembedding centred) or "raw".
        fingerprint: SHA-256 over config, tokenizer and weights as they were before processing.
        tokenizer: the Hugging Face tokenizer; None for a vision model.
        n_layers, n_heads, n_key_value_heads, d_model, d_head, d_mlp, d_vocab, n_ctx: the shapes.
            Queries have `n_heads` heads; keys and values have `n_key_value_heads` groups.
            `d_mlp` is 0 for a model of attention only, `d_vocab` for an encoder without a language-model head.
        gated_mlp: whether the MLP has a gate (Llama, Gemma) or not (GPT-2, GPT-NeoX).
        causal: whether a position sees only earlier ones.
    """

    bridge: Any
    name: str
    kind: Kind
    weights: Weights
    fingerprint: str
    tokenizer: Any
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    gated_mlp: bool
    causal: bool

    def __repr__(self) -> str:
        return (
            f"<Model {self.name!r}: {self.kind}, {self.n_layers} layers x {self.n_heads} heads "
            f"({self.n_key_value_heads} KV), d_model {self.d_model}, {self.weights} weights, "
            f"{self.dtype}, {self.device}, fingerprint {self.fingerprint[:12]}>"
        ).replace("torch.", "")

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.bridge.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.bridge.parameters()).dtype

    @property
    def provenance(self) -> dict[str, str]:
        """What a Result's `meta` says of the model: name, fingerprint, weight mode, dtype."""
        return {
            "model": self.name,
            "model_fingerprint": self.fingerprint,
            "weights": self.weights,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def tokenize(
        self, prompts: str | Sequence[str], *, prepend_bos: bool | None = None, padding_side: str = "left"
    ) -> Tokens:
        """Turn text into token ids, padding a ragged batch.

        Args:
            prompts: one text or several.
            prepend_bos: True or False; None does what the model's own tokenizer does (SmolLM2's and GPT-2's add none).
            padding_side: "left" (all prompts end at the last position) or "right".

        Returns:
            `Tokens(ids, mask)`, both `[batch pos]`, on the model's device.

        Raises:
            ValueError: for no prompts, an empty prompt, or one longer than the model's context.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("no prompts were given: pass one text or a list of at least one.")
        if self.tokenizer is None:
            raise ValueError(f"{self.name} is a {self.kind} model without a tokenizer: pass its inputs as a tensor.")
        rows = [self._ids(text, prepend_bos) for text in texts]
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(f"prompt {index} is empty: {texts[index]!r} has no tokens.")
            if len(row) > self.n_ctx:
                raise ValueError(
                    f"prompt {index} has {len(row)} tokens, but {self.name} has a context of {self.n_ctx}: "
                    f"shorten it, or cut it with interp.tasks.text(model, length={self.n_ctx})."
                )
        width = max(map(len, rows))
        pad = self.pad_token
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(width - len(row), width) if padding_side == "left" else slice(0, len(row))
            ids[index, where] = torch.tensor(row)
            mask[index, where] = 1
        return Tokens(ids.to(self.device), mask.to(self.device))

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=prepend_bos is None)["input_ids"])
        if prepend_bos:
            if self.tokenizer.bos_token_id is None:
                raise ValueError(f"{self.name}'s tokenizer has no BOS token: call with prepend_bos=False.")
            ids = [self.tokenizer.bos_token_id, *ids]
        return ids

    @property
    def pad_token(self) -> int:
        """Id used for padding: the tokenizer's own, else its end-of-text token, else 0."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0

    def to_str_tokens(self, ids: Tensor | Sequence[int]) -> list[str]:
        """Each token id as the text it stands for.

        Args:
            ids: one row of token ids, `[pos]`.

        Returns:
            One string a token, spaces kept.
        """
        return [self.tokenizer.decode([int(i)]) for i in ids]

    def single_token(self, text: str) -> int:
        """Id of a text that is exactly one token.

        Args:
            text: for example " Paris", with its leading space.

        Returns:
            The token id.

        Raises:
            ValueError: when it is several tokens; the message shows them.
        """
        ids = self._ids(text, False)
        if len(ids) != 1:
            raise ValueError(
                f"{text!r} is {len(ids)} tokens for {self.name}: {self.to_str_tokens(ids)}. "
                "Choose an answer of one token (a leading space often helps)."
            )
        return int(ids[0])

    def __call__(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the model without gradients.

        Args:
            tokens: token ids `[batch pos]` (for a vision model: pixels `[batch channel height width]`).
            mask: 1 on real tokens, 0 on padding, `[batch pos]`; None for no padding.

        Returns:
            Logits `[batch pos d_vocab]`; for an encoder or vision model, its last hidden state `[batch pos d_model]`.
        """
        from interp.models.hooks import run

        return run(self, tokens, mask=mask).logits

    def hook_point(self, name: str) -> nn.Module:
        """The hook point of that name.

        Args:
            name: a TransformerLens name such as "blocks.3.attn.hook_z".

        Returns:
            The HookPoint module.

        Raises:
            ValueError: when there is none; the nearest names are offered.
        """
        if name not in self._hooks:
            self.__dict__.pop("_hooks", None)  # one may have been added since
        if name not in self._hooks:
            raise ValueError(
                f"{self.name} has no hook {name!r}. Nearest: {', '.join(nearest(name, self._hooks)) or 'none'}. "
                "List them with sorted(model.bridge.hook_dict)."
            )
        return self._hooks[name]

    @cached_property
    def _hooks(self) -> dict[str, nn.Module]:
        # The bridge puts this dictionary together anew at each look, which takes 10 ms.
        return self.bridge.hook_dict
