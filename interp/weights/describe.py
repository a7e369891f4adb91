"""What is a head's operation, in words? Descriptors computed from its mappings, and a prompt for a language model.

Where MAPS (arXiv 2412.11965) asks a large language model what the mappings of a head have in common, here are first the
answers that need none: shares of the mappings that are copies, share a letter or an ending, or lie close in embedding
space, each beside the same share with sources and targets shuffled. The prompt can be given to any model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.core.registry import method
from interp.core.result import Result
from interp.models.model import Model
from interp.weights._parts import Head, embedded, unembedding
from interp.weights.maps import PAPER

#: Names of the descriptors, in the order in which they are computed.
DESCRIPTORS = ("copy", "copy up to case", "first letter", "prefix", "suffix", "neighbour")

# Letters that a shared beginning or ending must have.
_AFFIX = 3

_PROMPT = """\
Below are token pairs from one attention head of a language model: the head turns each input token into the output \
tokens beside it, strongest first. Describe in one sentence the pattern that the pairs follow, if there is one that \
holds for most of them; otherwise the pattern is "Unclear".

Answer with a JSON object with the keys "Reasoning" (one or two sentences), "Input strings" (what the input tokens \
have in common), and "Observed pattern" (the relation from input to output).

{pairs}

JSON:
"""


@method(name="MAPS: descriptors of a head's mappings", paper=PAPER, notebook="maps")
def descriptors(
    model: Model, mappings: Result, *, n_neighbours: int = 10, n_permutations: int = 100, seed: int = 0
) -> Result:
    """What share of a head's mappings are of a simple kind, against chance.

    A mapping (source, target) is a "copy" when both are the same text without the spaces around, a "copy up to case"
    when they differ in capitals at most, "first letter" when both begin with the same character up to case, "prefix"
    and "suffix" when their first or last 3 letters are the same (words with as many; no copies up to case),
    "neighbour" when the target is another token among the n_neighbours nearest to the source by cosine, in embedding
    space. A copy counts as one up to case and as having the first letter. Chance is the share after the targets have
    been permuted among the head's mappings.

    Args:
        model: whose tokens they are.
        mappings: what `salient.mappings` returned.
        n_neighbours: how near a neighbour is.
        n_permutations: permutations of the targets.
        seed: of the permutations.

    Returns:
        Result, unit "share of mappings", a row for each `layer`, `head` and descriptor (`metric`): `value`,
        `value_control` (mean under permutation), `value_p` (share of permutations with as much, the observed one
        included).

    Raises:
        ValueError: no mappings, or n_neighbours or n_permutations below 1.

    Cost: the embedding of all tokens once, and a product of it with each salient token's.

    Differs from the paper: it has no such descriptors; they stand in for its language model where there is none.

    Example:
        >>> from interp.models import toy
        >>> from interp.weights import salient
        >>> model = toy.random("llama", weights="raw")
        >>> found = descriptors(model, salient.mappings(model, [(1, 2)], n_tokens=5))
        >>> list(found.table["metric"]) == list(DESCRIPTORS)
        True
    """
    if n_neighbours < 1 or n_permutations < 1 or not len(mappings.table):
        raise ValueError(
            f"descriptors: n_neighbours={n_neighbours}, n_permutations={n_permutations} and {len(mappings.table)} "
            "mappings; each must be at least 1."
        )
    rng = np.random.default_rng(seed)
    near = _neighbours(model, np.unique(mappings.table["value_source"]), n_neighbours)
    rows = []
    for (layer, head), own in mappings.table.groupby(["layer", "head"], sort=False):
        sources = list(zip(own["src"], own["value_source"].astype(int), strict=True))
        targets = list(zip(own["dst"], own["value_target"].astype(int), strict=True))
        seen = {pair: _kinds(*pair, near) for pair in {(s, t) for s in sources for t in targets}}
        # [source target kind]: every permutation is a look at it
        table = np.array([[seen[s, t] for t in targets] for s in sources], dtype=np.float64)
        index = np.arange(len(own))
        observed = table[index, index].mean(0)
        null = np.stack([table[index, rng.permutation(index)].mean(0) for _ in range(n_permutations)])
        share = (1 + (null >= observed - 1e-9).sum(0)) / (1 + n_permutations)
        rows += [
            {"layer": layer, "head": head, "metric": name, "value": value, "value_control": control, "value_p": p}
            for name, value, control, p in zip(DESCRIPTORS, observed, null.mean(0), share, strict=True)
        ]
    meta = {**mappings.meta, "n_neighbours": n_neighbours, "n_permutations": n_permutations, "seed": seed}
    return Result("describe.descriptors", pd.DataFrame(rows), "share of mappings", meta=meta)


def _kinds(source: tuple[str, int], target: tuple[str, int], near: dict[int, frozenset[int]]) -> tuple[bool, ...]:
    """Which of `DESCRIPTORS` hold for one mapping."""
    a, b = source[0].strip(), target[0].strip()
    copy = a == b
    low, other = a.lower(), b.lower()
    whole = not copy and low != other and min(len(low), len(other)) >= _AFFIX
    return (
        copy,
        low == other,
        bool(low) and low[:1] == other[:1],
        whole and low[:_AFFIX] == other[:_AFFIX],
        whole and low[-_AFFIX:] == other[-_AFFIX:],
        target[1] in near[source[1]],
    )


@torch.no_grad()
def _neighbours(model: Model, sources: np.ndarray, n: int) -> dict[int, frozenset[int]]:
    """The nearest other tokens of each source."""
    n_vocab = unembedding(model).shape[1]
    rows = embedded(model, torch.arange(n_vocab, device=model.device))
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    found = {}
    for source in sources.tolist():
        likeness: Tensor = rows @ rows[source]
        likeness[source] = -torch.inf
        found[int(source)] = frozenset(likeness.topk(min(n, n_vocab - 1)).indices.tolist())
    return found


def prompt(mappings: Result, head: Head) -> str:
    """The question to a language model: what do a head's mappings have in common?

    Args:
        mappings: what `salient.mappings` returned.
        head: (layer, head), one that is in it.

    Returns:
        Text that asks for a JSON object with "Reasoning", "Input strings" and "Observed pattern"; tokens are quoted as
        JSON strings, so that spaces and line breaks show.

    Raises:
        ValueError: a head without mappings.

    Example:
        >>> from interp.models import toy
        >>> from interp.weights import salient
        >>> asked = prompt(salient.mappings(toy.random("llama", weights="raw"), [(1, 2)], n_tokens=1, k=2), (1, 2))
        >>> asked.splitlines()[-3].count('"')
        6
    """
    own = mappings.table[(mappings.table["layer"] == head[0]) & (mappings.table["head"] == head[1])]
    if not len(own):
        raise ValueError(f"there are no mappings of head {head} here: salient.mappings(model, [{head}]) makes them.")
    lines = []
    for _, group in own.groupby("value_source", sort=False):
        targets = ", ".join(json.dumps(text, ensure_ascii=False) for text in group["dst"])
        lines.append(f"{json.dumps(group['src'].iloc[0], ensure_ascii=False)} -> {targets}")
    return _PROMPT.format(pairs="\n".join(lines))


def write(model: Model, text: str, *, max_new_tokens: int = 100) -> str:
    """Continue a text with the most likely tokens.

    Args:
        model: a decoder.
        text: what to continue.
        max_new_tokens: most tokens to write; an end-of-text token or the end of the context stops before.

    Returns:
        What was written, without `text`.

    Raises:
        ValueError: a model that does not predict a next token, or a text that fills its context.

    Cost: one forward pass a token, each over the whole text so far.

    Example:
        >>> from interp.models import toy
        >>> len(write(toy.random("llama"), "w2 w3", max_new_tokens=3).split()) <= 3
        True
    """
    if model.kind != "decoder" or model.tokenizer is None:
        raise ValueError(
            f"{model.name} is a {model.kind} model: text is written by a decoder, for example "
            'interp.load("smollm2-135m").'
        )
    ids = model.tokenize(text).ids
    start = ids.shape[1]
    if start >= model.n_ctx:
        raise ValueError(
            f"the text has {start} tokens and fills the context of {model.n_ctx}: ask about fewer mappings."
        )
    end = model.tokenizer.eos_token_id
    for _ in range(min(max_new_tokens, model.n_ctx - start)):
        following = model(ids)[:, -1].argmax(-1, keepdim=True)
        if end is not None and int(following) == end:
            break
        ids = torch.cat([ids, following], 1)
    return str(model.tokenizer.decode(ids[0, start:].tolist()))


@method(name="MAPS: a language model's description", paper=PAPER, notebook="maps")
def explain(mappings: Result, heads: Sequence[Head], *, writer: Callable[[str], str]) -> Result:
    """What a language model says that heads' mappings have in common.

    Args:
        mappings: what `salient.mappings` returned.
        heads: (layer, head) pairs that are in it.
        writer: from `prompt` to an answer: a call of any service, or of a loaded model,
            `lambda text: write(model, text)`.

    Returns:
        Result, unit "1 if a pattern was named", a row a head: `layer head`, `target` (the "Observed pattern", empty
        where the answer holds none), `value` 1 or 0 (no JSON object, or "Unclear"), `token` (the whole answer).

    Raises:
        ValueError: a head without mappings.

    Cost: one call of `writer` a head.

    Differs from the paper: this prompt is our own. Nobody checks whether the answer is right: compare with
    `descriptors`.

    Example:
        >>> from interp.models import toy
        >>> from interp.weights import salient
        >>> found = salient.mappings(toy.random("llama", weights="raw"), [(1, 2)], n_tokens=2)
        >>> explain(found, [(1, 2)], writer=lambda text: '{"Observed pattern": "copies"}').table["target"].tolist()
        ['copies']
    """
    rows = []
    for head in heads:
        answer = writer(prompt(mappings, head))
        pattern = _pattern(answer)
        clear = bool(pattern) and not pattern.lower().startswith("unclear")
        rows.append({"layer": head[0], "head": head[1], "target": pattern, "value": float(clear), "token": answer})
    columns = ["layer", "head", "target", "value", "token"]
    meta = dict(mappings.meta)
    return Result("describe.explain", pd.DataFrame(rows, columns=columns), "1 if a pattern was named", meta=meta)


def _pattern(answer: str) -> str:
    """The "Observed pattern" of the first JSON object in an answer, empty where there is none."""
    for start in (found.start() for found in re.finditer(r"\{", answer)):
        try:
            said = json.JSONDecoder().raw_decode(answer[start:])[0]
        except json.JSONDecodeError:
            continue
        pattern = said.get("Observed pattern")
        return pattern.strip() if isinstance(pattern, str) else ""
    return ""
