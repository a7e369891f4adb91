"""How is a mechanism written into a GPT-2's weights? One-hot subspaces, heads that look things up, ReLU neurons.

The stream is cut into named subspaces ("tok", "pos", ...), one direction a symbol. Two tricks make it exact:

- *No norm.* The epsilon of every LayerNorm is 2^40 and its gain 2^20, so that it divides by 2^20 and multiplies by it,
  whatever it reads: to the last bit it only subtracts the mean. Gradients pass through it unchanged.
- *No mean.* The last dimension is the counterweight: each embedding, head and neuron writes there minus the sum of
  what it writes elsewhere. Nothing reads it.

So the input of every head and MLP, and of the unembedding, is the plain sum of what was written before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.models.load import load
from interp.models.model import Model
from interp.models.toy import tokenizer

#: Token ids that every planted model has: where heads rest, where the answer is asked for, and a word of no meaning.
BOS, END, FILLER = 0, 2, 3
#: The first token id that a mechanism may give a meaning.
WORDS = 4
#: Attention to a key barred by this score is exactly zero in float32.
BARRED = 200.0

_D_HEAD = 16  # its root is exact, and so are the scores
_N_CONTEXT = 12  # what the self-check of `load` needs
_GAIN = 2.0**20

Rows = Float[Tensor, "_ d_model"]


@dataclass(frozen=True, eq=False)
class Build:
    """A model under construction.

    Attributes:
        module: the GPT-2, all of whose weights are zero but the embeddings and norms.
        subspaces: the directions of each subspace, one a row.
    """

    module: Any
    subspaces: Mapping[str, Rows]

    def __getitem__(self, name: str) -> Rows:
        return self.subspaces[name]

    @property
    def words(self) -> Rows:
        """The directions of the tokens that have a meaning."""
        return self["tok"][WORDS:]

    @property
    def end(self) -> Rows:
        """One row that reads 1 at the last token of a prompt and 0 elsewhere."""
        return self["tok"][END : END + 1]


def blank(n_layers: int, n_heads: int, *, n_words: int, n_neurons: int = 1, **sizes: int) -> Build:
    """A GPT-2 that computes nothing yet.

    Args:
        n_layers: layers.
        n_heads: heads a layer, of 16 dimensions each.
        n_words: tokens with a meaning; the vocabulary has four more (see `BOS`, `END`, `FILLER`; 1 is "<eos>").
        n_neurons: neurons an MLP.
        sizes: dimensions of further subspaces, by name.

    Returns:
        The Build. It has the subspaces "tok" (one-hot token), "pos" (one-hot position), "one" (constant 1) and `sizes`.
    """
    import transformers

    n_vocab = WORDS + n_words
    sizes = {"tok": n_vocab, "pos": _N_CONTEXT, "one": 1} | sizes
    width = n_heads * _D_HEAD
    if sum(sizes.values()) >= width:
        raise ValueError(f"the subspaces need {sum(sizes.values())} + 1 dimensions and {n_heads} heads have {width}.")
    config = transformers.GPT2Config(
        n_layer=n_layers, n_head=n_heads, n_embd=width, n_inner=n_neurons, vocab_size=n_vocab, n_positions=_N_CONTEXT,
        bos_token_id=BOS, eos_token_id=1, tie_word_embeddings=False, activation_function="relu",
        layer_norm_epsilon=_GAIN**2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        module: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    subspaces = dict(zip(sizes, torch.eye(width)[: sum(sizes.values())].split(list(sizes.values())), strict=True))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(_GAIN if ".ln_" in name and name.endswith("weight") else 0.0)
        module.transformer.wte.weight.copy_(subspaces["tok"] + subspaces["one"])
        module.transformer.wpe.weight.copy_(subspaces["pos"])
    return Build(module, subspaces)


@torch.no_grad()
def head(
    build: Build,
    at: tuple[int, int],
    *,
    asks: Float[Tensor, "1 d_model"],
    want: Float[Tensor, "match d_model"],
    offer: Float[Tensor, "match d_model"],
    value: Float[Tensor, "entry d_model"],
    write: Float[Tensor, "entry d_model"],
    sharpness: float = 20.0,
    bar: tuple[Float[Tensor, "barred d_model"], Float[Tensor, "barred d_model"]] | None = None,
) -> None:
    """Make a head that looks something up.

    Where `asks` reads 1, the score of a key is 2 sharpness (want . query)(offer . key), summed over the rows: a match
    scores 2 sharpness and anything else 0, and the first token ("<bos>") scores `sharpness`, for when nothing matches.
    Where `asks` reads 0 the first token scores `sharpness` + 200: the head rests there and writes nothing, since no
    head has a value for it.

    Args:
        build: the model.
        at: (layer, head).
        asks: one row; it reads 1 in the stream of the positions that ask, and 0 in the others.
        want: what the query reads.
        offer: what the key reads, row by row.
        value: what is read from the positions attended to.
        write: where each row of `value` goes, row by row.
        sharpness: half the score of a match. From 20 on, attention to one is 1 to the last bit of float32.
        bar: (query rows, key rows) of keys that must get no attention, -200 a match.
    """
    one = build["one"]
    queries = [2 * sharpness * want, sharpness * one + BARRED * (one - asks)]
    keys = [offer, build["tok"][BOS : BOS + 1]]
    if bar is not None:
        queries.append(-BARRED * bar[0])
        keys.append(bar[1])
    attention, columns = _columns(build, at)
    query, key, _ = columns
    rows = torch.cat(queries)
    attention.c_attn.weight[:, query[: len(rows)]] = _D_HEAD**0.5 * rows.T
    attention.c_attn.weight[:, key[: len(rows)]] = torch.cat(keys).T
    copier(build, at, value=value, write=write)


@torch.no_grad()
def copier(
    build: Build,
    at: tuple[int, int],
    *,
    value: Float[Tensor, "entry d_model"],
    write: Float[Tensor, "entry d_model"],
) -> None:
    """Make a head, which has no scores and so attends evenly, copy: `value` is read, `write` written, row by row."""
    attention, (own, _, values) = _columns(build, at)
    attention.c_attn.weight[:, values[: len(value)]] = value.T
    attention.c_proj.weight[own[: len(write)]] = write


@torch.no_grad()
def neurons(
    build: Build,
    layer: int,
    *,
    read: Float[Tensor, "neuron d_model"],
    bias: float | Float[Tensor, " neuron"],
    write: Float[Tensor, "neuron d_model"],
) -> None:
    """Make the first neurons of an MLP compute relu(read . stream + bias) each, and write it along `write`."""
    mlp = build.module.transformer.h[layer].mlp
    mlp.c_fc.weight[:, : len(read)] = read.T
    mlp.c_fc.bias[: len(read)] = bias
    mlp.c_proj.weight[: len(write)] = write


@torch.no_grad()
def finish(build: Build, *, out: Rows, scale: float) -> Model:
    """Let the logits of the words read `out`, row by row, times `scale`; set the counterweights; load.

    Args:
        build: the model.
        out: one row a word, from the first on; the words left over have the logit 0.
        scale: logits a unit.

    Returns:
        The Model, raw weights.
    """
    body = build.module.transformer
    build.module.lm_head.weight[WORDS : WORDS + len(out)] = scale * out
    writers = [body.wte, body.wpe] + [part for block in body.h for part in (block.attn.c_proj, block.mlp.c_proj)]
    for writer in writers:
        writer.weight[:, -1] = -writer.weight[:, :-1].sum(-1)
    return load(build.module.eval(), tokenizer=tokenizer(len(body.wte.weight)), weights="raw")


def _columns(build: Build, at: tuple[int, int]) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    # GPT-2 keeps q, k and v side by side as [d_model, 3 d_model]; a head owns _D_HEAD columns of each.
    attention = build.module.transformer.h[at[0]].attn
    own = torch.arange(_D_HEAD) + at[1] * _D_HEAD
    width = build.module.config.n_embd
    return attention, (own, width + own, 2 * width + own)
