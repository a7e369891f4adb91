"""Does moving a head along its lens raise the token? The lens's direction of a token against random ones.

The other direction of `faithfulness`: there the head is taken away, here something is put in. A direction in a head's
d_head dimensions that a lens gives to a token is worth something if the model, run on, says that token more, and more
than after a push of the same length in a random direction.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.core.batching import batches
from interp.core.edits import Edit
from interp.core.readout import Readout
from interp.core.registry import method
from interp.core.rerun import ExactPath, rerun
from interp.core.result import Result
from interp.lenses._heads import Head, end_of, heads_of, provenance_of, token_map
from interp.lenses._reading import as_task
from interp.lenses.attention import AttentionLens
from interp.models.hooks import run
from interp.models.model import Model
from interp.models.program import hook_name
from interp.tasks.task import Task

METRICS = ("logit", "log_prob", "rank")

#: Logits of the clean runs that are kept together: 2^25 float32 are 128 MB.
_ROOM = 2**25


@method(name="Steering along a lens", paper="arXiv:2310.16270", notebook="attention_lens")
@torch.no_grad()
def steer(
    model: Model,
    task: Task | Tensor,
    lenses: Mapping[str, AttentionLens],
    *,
    heads: Sequence[Head],
    tokens: Sequence[int],
    doses: Sequence[float] = (1.0,),
    n_random: int = 20,
    seed: int = 0,
    exact_path: ExactPath | None = None,
) -> Result:
    """What the model says when a head is moved along the direction that a lens has for a token.

    With A `[d_head d_vocab]` the lens's map of a head, the direction of token t is a = A_t - mean over v of A_v (a
    logit's level means nothing). The head's z at the end of the prompt becomes

        z + dose |z| a / |a|,

    |z| its mean length over the prompts, and everything after it is computed again. The same is done with random
    directions, uniform on the sphere, of the same length.

    Args:
        model: a decoder, the lenses'.
        task: prompts or token ids `[batch pos]`; read at the position "end", else the last.
        lenses: by name.
        heads: (layer, head), which all lenses have.
        tokens: ids of the tokens to raise.
        doses: lengths of the step, in mean lengths of z; negative ones push the other way.
        n_random: random directions a head, the same for all tokens, prompts and doses.
        seed: of the random directions.
        exact_path: see `interp.core.rerun.rerun`.

    Returns:
        Result, unit "logits, nats or tokens"; three rows a prompt, head, token, lens and dose: prompt, layer, head,
        token (its text), component (the lens), value_dose, metric, value, value_random (mean over the random
        directions), value_random_high (the largest of them) and value_share (share of them that are below value).
        `metric` is "logit" (the change of t's logit less that of the mean logit), "log_prob" (of t, nats) and "rank"
        (minus the number of tokens whose logit rises more than t's: 0 is the best).

    Raises:
        ValueError: a head or token that there is not, a lens without a direction for the token (its map is constant),
            a lens of another model.

    Cost: two forward passes, and for each head, dose and direction (tokens x lenses + n_random) the layers after the
        head at one position, and the unembedding.

    Example: a lens that copies, and a step along it, are in tests/lenses/test_steering.py.
    """
    task = as_task(model, task)
    heads = heads_of(model, lenses, heads)
    tokens = [int(token) for token in tokens]
    if not tokens or min(tokens) < 0 or max(tokens) >= model.d_vocab:
        raise ValueError(f"tokens={tokens}: give one id or more, of 0 to {model.d_vocab - 1}.")
    if n_random < 1 or not len(doses):
        raise ValueError(f"n_random={n_random}, doses={list(doses)}: compare with one direction and one dose at least.")
    names = list(lenses)
    pushes = {at: _directions(model, lenses, at, tokens, n_random, seed) for at in heads}
    size = max(1, _ROOM // model.d_vocab)
    spans = list(batches(len(task), size))
    z = torch.cat([_z(model, task[rows], heads) for rows in spans])  # [batch which d_head]
    length = z.norm(dim=-1).mean(0)
    frames = []
    for rows in tqdm(spans, desc="steering", leave=False, disable=len(spans) < 2):
        some, where = task[rows], end_of(task[rows])
        read = _readout(model, some, where, tokens)
        for which, at in enumerate(heads):
            steps = torch.tensor(doses, device=z.device)[:, None, None] * length[which] * pushes[at]
            moved = z[rows, which] + steps.flatten(0, 1)[:, None]  # [dose x direction, batch, d_head]
            cells = [[Edit("z", at[0], head=at[1], pos=where, value=value)] for value in moved]
            found = rerun(model, some.clean, cells, read, mask=some.mask, exact_path=exact_path)
            found = found.unflatten(-1, (len(METRICS), len(tokens))).unflatten(0, (len(doses), -1)).double().cpu()
            frames.append(_frame(found.numpy(), at, names, model.to_str_tokens(tokens), doses, rows.start))
    table = pd.concat(frames, ignore_index=True)
    table = table.sort_values(["prompt", "layer", "head"], kind="stable", ignore_index=True)
    meta = provenance_of(
        model, task, lenses, heads=[list(at) for at in heads], tokens=tokens, doses=list(doses), n_random=n_random,
        seed=seed,
    )  # fmt: skip
    return Result("steering.steer", table, "logits, nats or tokens", meta=meta)


def _directions(
    model: Model, lenses: Mapping[str, AttentionLens], at: Head, tokens: Sequence[int], n_random: int, seed: int
) -> Float[Tensor, "direction d_head"]:
    """Unit vectors: those of each lens's tokens, lens by lens, then the random ones."""
    found = []
    for name, lens in lenses.items():
        own = token_map(model, lens, *at, tokens)
        lengths = own.norm(dim=-1, keepdim=True)
        if not bool((lengths > 0).all()):
            token = model.to_str_tokens([tokens[int(lengths[:, 0].argmin())]])[0]
            raise ValueError(
                f"the lens {name!r} of head {at} has the same logit for {token!r} as for the mean token, whatever the "
                "head holds: there is no direction to move along."
            )
        found.append(own / lengths)
    # A generator for each head: its directions do not depend on which others are asked for.
    random = np.random.default_rng([seed, *at]).standard_normal((n_random, found[0].shape[-1]))
    drawn = torch.from_numpy(random).to(found[0])
    return torch.cat([*found, drawn / drawn.norm(dim=-1, keepdim=True)])


def _z(model: Model, task: Task, heads: Sequence[Head]) -> Tensor:
    """What the heads hold at the end of each prompt, `[batch which d_head]`, in float32."""
    names = {layer: hook_name("z", layer) for layer, _ in heads}
    cache = run(model, task.clean, capture=list(names.values()), mask=task.mask, stop_after=max(names)).cache
    rows, where = torch.arange(len(task), device=task.clean.device), end_of(task)
    return torch.stack([cache[names[layer]][rows, where, head].float() for layer, head in heads], 1)


def _readout(model: Model, task: Task, where: Tensor, tokens: Sequence[int]) -> Readout:
    """What becomes of each token, against the clean run: `METRICS`, `[row metric x token]`."""
    rows = torch.arange(len(task), device=where.device)
    clean = run(model, task.clean, mask=task.mask).logits[rows, where].float()

    def score(logits: Tensor, owner: Tensor) -> Tensor:
        before, after = clean[owner], logits.float()
        rise = after - before
        own = rise[:, tokens]
        log_prob = own - after.logsumexp(-1, keepdim=True) + before.logsumexp(-1, keepdim=True)
        rank = torch.stack([-(rise > each[:, None]).sum(-1) for each in own.T], 1)
        return torch.cat([own - rise.mean(-1, keepdim=True), log_prob, rank.to(own.dtype)], -1)

    return Readout("rise", "logits", where, None, score)


def _frame(
    found: np.ndarray, at: Head, names: Sequence[str], texts: Sequence[str], doses: Sequence[float], first: int
) -> pd.DataFrame:
    """The rows of one head, of `[dose direction batch metric token]`."""
    n_tokens = len(texts)
    directed, drawn = np.split(found, [len(names) * n_tokens], axis=1)
    frames = []
    for (i, name), (token, text) in itertools.product(enumerate(names), enumerate(texts)):
        values = directed[:, i * n_tokens + token, :, :, token]  # [dose batch metric]
        others = drawn[..., token]  # [dose draw batch metric]
        dose, prompt, metric = np.indices(values.shape).reshape(3, -1)
        frames.append(
            pd.DataFrame({
                "prompt": first + prompt, "layer": at[0], "head": at[1], "token": text, "component": name,
                "value_dose": np.asarray(doses, dtype=float)[dose],
                "metric": np.array(METRICS, dtype=object)[metric], "value": values.ravel(),
                "value_random": others.mean(1).ravel(), "value_random_high": others.max(1).ravel(),
                "value_share": (others < values[:, None]).mean(1).ravel(),
            })
        )  # fmt: skip
    return pd.concat(frames)
