"""What is the smallest GPT-2 that can carry an explicit attention bias? The decoder that `attention_bias` trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The three arms of the paper: plain GPT-2; one learned embedding in front; a learned key and value in every head.
ARMS = ("default", "sink", "attn_bias")


@dataclass(frozen=True, eq=False)
class Seen:
    """What one block showed: its output `[batch pos d_model]` and its attention `[batch head q_pos k_pos]`.

    In the arm "sink", position 0 of both is the sink and the text begins at 1. In the arm "attn_bias", column 0 of the
    attention is k' and the text begins at column 1.
    """

    resid_post: Tensor
    pattern: Tensor


def attention_with_bias(q: Tensor, k: Tensor, v: Tensor, k_bias: Tensor, v_bias: Tensor) -> Tensor:
    """Causal attention with an explicit bias: softmax(Q [K^T k'] / sqrt(d_head)) [V ; v'^T], Eq. 3 of the paper.

    Every query sees k' in addition to the tokens up to its own. The output is out_t = lambda_t v' + (1 - lambda_t)
    plain_t, where plain is attention without the bias and lambda is `bias_share`: a mixture with a constant vector.

    Args:
        q: queries `[batch head pos d_head]`.
        k: keys, the same shape.
        v: values, the same shape.
        k_bias: k' `[head d_head]`.
        v_bias: v' `[head d_head]`.

    Returns:
        `[batch head pos d_head]`.
    """
    batch, _, pos, _ = q.shape
    keys, values = (
        torch.cat([bias[None, :, None].expand(batch, -1, 1, -1), tokens], dim=2)
        for bias, tokens in ((k_bias, k), (v_bias, v))
    )
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=_visible(pos, 1, q.device))


def bias_share(q: Tensor, k: Tensor, k_bias: Tensor) -> Tensor:
    """Attention that each query pays to k' in `attention_with_bias`: lambda_t.

    lambda_t = e^(q_t.k'/sqrt(d_head)) / (e^(q_t.k'/sqrt(d_head)) + sum over j <= t of e^(q_t.k_j/sqrt(d_head)))

    Args:
        q: queries `[batch head pos d_head]`.
        k: keys, the same shape.
        k_bias: k' `[head d_head]`.

    Returns:
        `[batch head pos]`, a share of attention between 0 and 1.
    """
    return attention_pattern(q, k, k_bias)[..., 0]


def attention_pattern(q: Tensor, k: Tensor, k_bias: Tensor | None = None) -> Tensor:
    """Causal attention weights, with k' as column 0 if it is given.

    Args:
        q: queries `[batch head pos d_head]`.
        k: keys, the same shape.
        k_bias: k' `[head d_head]`, or None.

    Returns:
        `[batch head q_pos k_pos]`, with one more column when there is a bias; rows sum to 1.
    """
    keys = k if k_bias is None else torch.cat([k_bias[None, :, None].expand(len(k), -1, 1, -1), k], dim=2)
    visible = _visible(q.shape[2], keys.shape[2] - k.shape[2], q.device)
    scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def _visible(pos: int, n_bias: int, device: torch.device) -> Tensor:
    """`[pos, n_bias + pos]`: a query sees the bias columns and the tokens up to its own."""
    return torch.ones(pos, n_bias + pos, dtype=torch.bool, device=device).tril(diagonal=n_bias)


class Block(nn.Module):
    """One pre-norm block of GPT-2; `k_bias` and `v_bias` exist in the arm "attn_bias" only."""

    def __init__(self, n_heads: int, d_model: int, attn_bias: bool) -> None:
        """Make the layers; `SmallGPT` draws the weights."""
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.attn_out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp_in, self.mlp_out = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        shape = (n_heads, d_model // n_heads)
        self.k_bias = nn.Parameter(torch.empty(shape)) if attn_bias else None
        self.v_bias = nn.Parameter(torch.empty(shape)) if attn_bias else None

    def forward(self, resid: Tensor, seen: list[Seen] | None = None) -> Tensor:
        """Residual stream in, residual stream out, `[batch pos d_model]`; appends to `seen` when it is given."""
        batch, pos, d_model = resid.shape
        heads = self.qkv(self.ln_1(resid)).view(batch, pos, 3, self.n_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.k_bias is None or self.v_bias is None:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            z = attention_with_bias(q, k, v, self.k_bias, self.v_bias)
        resid = resid + self.attn_out(z.transpose(1, 2).reshape(batch, pos, d_model))
        resid = resid + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(resid)), approximate="tanh"))
        if seen is not None:
            seen.append(Seen(resid, attention_pattern(q, k, self.k_bias)))
        return resid


class SmallGPT(nn.Module):
    """GPT-2 (pre-norm, learned positions, GELU, tied embedding, no dropout) in one of the three `ARMS`.

    Arms with one seed start from the same weights; what an arm adds is drawn after them.
    """

    def __init__(
        self, arm: str, *, d_vocab: int, n_layers: int, n_heads: int, d_model: int, context: int, seed: int
    ) -> None:
        """Build it and draw the weights.

        Args:
            arm: one of `ARMS`.
            d_vocab: number of symbols.
            n_layers: number of blocks.
            n_heads: heads a block.
            d_model: width of the residual stream, a multiple of n_heads.
            context: most tokens in a sequence.
            seed: seed of the weights, drawn on the CPU.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # building draws weights from the global generator: leave it as it was
            self.token_embedding = nn.Embedding(d_vocab, d_model)
            self.position_embedding = nn.Embedding(context, d_model)
            self.blocks = nn.ModuleList([Block(n_heads, d_model, arm == "attn_bias") for _ in range(n_layers)])
            self.ln_final = nn.LayerNorm(d_model)
        self.sink = nn.Parameter(torch.empty(1, d_model)) if arm == "sink" else None
        self._draw(torch.Generator().manual_seed(seed), n_layers)

    @torch.no_grad()
    def _draw(self, generator: torch.Generator, n_layers: int) -> None:
        # GPT-2's: N(0, 0.02), and what writes to the residual stream is scaled down by the number of writers.
        own = ("sink", "k_bias", "v_bias")
        for name, parameter in sorted(self.named_parameters(), key=lambda item: item[0].endswith(own)):
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
                continue
            scale = (2 * n_layers) ** -0.5 if name.endswith("_out.weight") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02 * scale)

    def forward(self, ids: Tensor, seen: list[Seen] | None = None) -> Tensor:
        """Logits `[batch pos d_vocab]` of token ids `[batch pos]`; each block appends to `seen` when it is given."""
        resid = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        if self.sink is not None:  # no position embedding: the text keeps its own
            resid = torch.cat([self.sink.expand(len(ids), 1, -1), resid], dim=1)
        for block in self.blocks:
            resid = block(resid, seen)
        if self.sink is not None:
            resid = resid[:, 1:]
        return self.ln_final(resid) @ self.token_embedding.weight.T
