"""Which components are the true ones? Small GPT-2s whose mechanism was written into the weights by hand.

Each function returns a `Planted`: a model, prompts in clean and corrupt pairs, and the truth about which heads, MLPs
and edges make the difference between them. They are the oracles of patching and of circuit discovery, and include the
cases that a method is known to miss. All other heads are of two kinds: most write nothing, and one or two a model are
*distractors*, which copy words into a subspace that nothing reads, so that their activations vary in vain.

How a model is made exact is said in `interp.models._planted_build`: no norm has an effect, so every input is the plain
sum of what was written before it. Answers are compared at the last position, by the logit of `answers` minus that of
`wrong`; effects below are fractions of the gap between the clean and the corrupt prompt, for patching activations
of the corrupt prompt into the clean one.
"""

from __future__ import annotations

from itertools import permutations
from typing import Literal

import torch

from interp.models._planted_build import BOS, END, FILLER, WORDS, blank, finish, head, neurons
from interp.models._planted_case import Planted, any_of, distract, make, name_of, prompt, read_from_end

__all__ = [
    "Planted", "and_gate", "backup_head", "cancelling_pair", "greater_than_like", "induction_like", "ioi_like",
    "or_gate", "saturation",
]  # fmt: skip

_SCALE = 8.0  # logits of an answer that is copied once


def ioi_like(*, sharpness: float = 3.0) -> Planted:
    """Indirect objects: "<bos> A B . B . <end>" is continued with A, by three stages of heads.

    The duplicate-token head (0, 1) attends, from a name, to an earlier copy of it, and writes the name into "dup". The
    inhibition head (1, 0) attends, from the end, to the position that has something in "dup" (the second mention, S2),
    and writes that name into "inhibit". The movers (2, 1) and (2, 2) attend, from the end, to the names at positions 1
    and 2 except the one in "inhibit", and copy it to "out", the second half as strongly; the negative head (2, 3)
    attends likewise and writes minus a quarter of it. All layers have idle heads.

    Corrupt prompts have A for the second B, so that the answer is B. Only the token at S2 differs. Patching the
    duplicate head or the inhibition head has the effect 1, the movers 4/5 and 2/5 and the negative head -1/5.

    Args:
        sharpness: 1 to 100, how much a match outscores the place to rest; twice that, what does not match. At 3 a
            first-order estimate gives the first two stages a fifth of their effect; at 6, 1/60; from 20 on nothing.

    Returns:
        The Planted, with 24 prompts of 7 tokens; positions "io", "s1", "s2", "end".

    Raises:
        ValueError: for a sharpness out of that range.

    Example:
        >>> planted = ioi_like()
        >>> planted.truth["mover"], planted.prompts[1]
        (((2, 1), (2, 2)), '<bos> w5 w4 w3 w5 w3 w2')
    """
    _require_sharp(sharpness)
    n = 4
    build = blank(3, 4, n_words=n, dup=n, inhibit=n, out=n, junk=n)
    names, end, pos = build.words, build.end, build["pos"]
    head(
        build, (0, 1), asks=any_of(names), want=names, offer=names, value=names, write=build["dup"],
        sharpness=sharpness, bar=(pos[1:], pos[1:]),  # a name is no copy of itself
    )  # fmt: skip
    head(
        build, (1, 0), asks=end, want=end, offer=any_of(build["dup"]), value=build["dup"], write=build["inhibit"],
        sharpness=sharpness,
    )  # fmt: skip
    for at, strength in (((2, 1), 1.0), ((2, 2), 0.5), ((2, 3), -0.25)):
        head(
            build, at, asks=end, want=end - build["inhibit"], offer=names, value=names, write=strength * build["out"],
            sharpness=sharpness, bar=(end, any_of(pos[3:])),
        )  # fmt: skip
    distract(build, (0, 3), (1, 2))
    clean, corrupt, columns = [], [], []
    for index, (io, s, first) in enumerate((*pair, turn) for pair in permutations(range(n), 2) for turn in (0, 1)):
        s2 = 3 + index % 3
        row = [BOS, WORDS + io, WORDS + s, FILLER, FILLER, FILLER, END]
        row[1 + first], row[2 - first] = WORDS + io, WORDS + s
        clean.append([*row[:s2], WORDS + s, *row[s2 + 1 :]])
        corrupt.append([*row[:s2], WORDS + io, *row[s2 + 1 :]])
        columns.append((1 + first, 2 - first, s2, WORDS + io, WORDS + s))
    *where, answers, wrong = zip(*columns, strict=True)
    last = ("a2.h1", "a2.h2", "a2.h3")
    return make(
        "ioi_like", finish(build, out=build["out"], scale=_SCALE), clean, corrupt, answers, wrong,
        positions=dict(zip(("io", "s1", "s2"), where, strict=True)),
        truth={"duplicate": [(0, 1)], "inhibition": [(1, 0)], "mover": [(2, 1), (2, 2)], "negative": [(2, 3)]},
        where={"duplicate": "s2", "inhibition": "end", "mover": "end", "negative": "end"},
        edges=[
            ("input", "a0.h1<q>"), ("a0.h1", "a1.h0<v>"),
            *(("a1.h0", f"{name}<q>") for name in last), *((name, "logits") for name in last),
        ],
    )  # fmt: skip


def induction_like(*, sharpness: float = 3.0) -> Planted:
    """Induction: "<bos> a b c d e b" is continued with c, by two heads.

    The previous-token head (0, 2) writes the word before each position into "prev". The induction head (1, 0) attends,
    from a word, to the position whose "prev" is that word, and copies the word there to "out". At a `sharpness` of 60
    or more this is the saturated softmax: the gradients for its query and key are zero, and the effects as large.

    Corrupt prompts have the words in another order and ask for another one, so that query, keys and values all differ.
    Patching the previous-token head has the effect 1/2 (there is no answer then), the induction head 1.

    Args:
        sharpness: 1 to 100, how much a match outscores the place to rest; twice that, a word that does not match.

    Returns:
        The Planted, with 24 prompts of 7 tokens; positions "next" (of the answer), "end".

    Raises:
        ValueError: for a sharpness out of that range.
    """
    _require_sharp(sharpness)
    n, long = 6, 5
    build = blank(2, 3, n_words=n, prev=n, out=n, junk=n)
    words, pos = build.words, build["pos"]
    head(
        build, (0, 2), asks=build["one"] - build["tok"][BOS], want=pos[1:], offer=pos[:-1], value=words,
        write=build["prev"],
    )  # fmt: skip
    head(
        build, (1, 0), asks=any_of(words), want=words, offer=build["prev"], value=words, write=build["out"],
        sharpness=sharpness,
    )  # fmt: skip
    distract(build, (0, 0), (1, 2))
    clean, corrupt, columns = [], [], []
    for start in range(n):
        text = [WORDS + (start + i) % n for i in range(long)]
        for asked, other in ((0, 2), (1, 3), (2, 4), (3, 0)):
            clean.append([BOS, *text, text[asked]])
            corrupt.append([BOS, *text[2:], *text[:2], text[other]])
            columns.append((asked + 2, text[asked + 1], text[(other + 1) % long]))
    following, answers, wrong = zip(*columns, strict=True)
    return make(
        "induction_like", finish(build, out=build["out"], scale=_SCALE), clean, corrupt, answers, wrong,
        positions={"next": following},
        truth={"previous": [(0, 2)], "induction": [(1, 0)]},
        where={"previous": "next", "induction": "end"},
        edges=[
            ("input", "a0.h2<v>"), ("a0.h2", "a1.h0<k>"), ("input", "a1.h0<q>"), ("input", "a1.h0<v>"),
            ("a1.h0", "logits"),
        ],
    )  # fmt: skip


def cancelling_pair() -> Planted:
    """Two heads write 2v and -2v to the answer: each matters much, and the pair together not at all.

    From the end all three planted heads attend to the one word of the prompt and write it to "out": the main head
    (1, 0) once, the plus head (0, 1) twice, the minus head (1, 2) minus twice.

    Corrupt prompts have another word. Patching the main head has the effect 1, the plus head 2, the minus head -2, and
    plus and minus together 0.

    Returns:
        The Planted, with 12 prompts of 5 tokens; positions "word", "end".
    """
    n = 4
    build = blank(2, 3, n_words=n, out=n, junk=n)
    strengths = {"main": ((1, 0), 1.0), "plus": ((0, 1), 2.0), "minus": ((1, 2), -2.0)}
    for at, strength in strengths.values():
        read_from_end(build, at, build.words, value=build.words, write=strength * build["out"])
    distract(build, (0, 2))
    pairs = [((i, (i + 1) % n), place) for i in range(n) for place in (1, 2, 3)]
    clean, corrupt = ([prompt(5, {place: pair[side]}) for pair, place in pairs] for side in (0, 1))
    heads = [name_of(at) for at, _ in strengths.values()]
    return make(
        "cancelling_pair", finish(build, out=build["out"], scale=_SCALE), clean, corrupt,
        [WORDS + pair[0] for pair, _ in pairs], [WORDS + pair[1] for pair, _ in pairs],
        positions={"word": [place for _, place in pairs]},
        truth={stage: [at] for stage, (at, _) in strengths.items()},
        where=dict.fromkeys(strengths, "end"),
        edges=[*(("input", f"{name}<v>") for name in heads), *((name, "logits") for name in heads)],
    )  # fmt: skip


def or_gate() -> Planted:
    """Two heads, each of which suffices: one alone can be patched without effect, both together have it all.

    The prompt has two words that name the same answer, one of each kind. From the end head (0, 1) copies the word of
    the first kind into "a" and head (1, 2) that of the second kind into "b". The MLP of layer 1 writes
    1 - relu(1 - a - b) = min(1, a + b) to "out" for each answer, with a neuron an answer and one for the constant.

    Corrupt prompts have the word of each kind that names nothing. The MLP, and both heads together, have the effect 1.
    At the clean prompt the gradient for either head is 0; its mean along the way from the corrupt one gives each 1/2.

    Returns:
        The Planted, with 18 prompts of 5 tokens; positions "a", "b", "end".
    """
    return _gate("or")


def and_gate() -> Planted:
    """Two heads that are both needed: patching one has the full effect, as has patching both.

    As `or_gate`, but the MLP writes relu(a + b - 1). At the clean prompt the gradient gives each head 1, as patching
    does; at the corrupt prompt it gives 0, and along the way 1/2.

    Returns:
        The Planted, with 18 prompts of 5 tokens; positions "a", "b", "end".
    """
    return _gate("and")


def backup_head() -> Planted:
    """A second head that acts only where the first one is missing.

    From the end the primary head (0, 1) copies the one word of the prompt to "out". The backup head (1, 2) would do the
    same, but its query gets -200 for anything that is in "out" already.

    Corrupt prompts have a word that names nothing. Patching the primary head has the effect 0: its direct effect on the
    logits is 1, and the backup head, which was idle, makes up for it. Patching the backup head alone has the
    effect 0, both the effect 1.

    Returns:
        The Planted, with 9 prompts of 5 tokens; positions "word", "end".
    """
    n = 3
    build = blank(2, 3, n_words=n + 1, out=n, junk=n)
    words, names, out = build.words, build.words[:n], build["out"]
    read_from_end(build, (0, 1), words, value=names, write=out)
    head(
        build, (1, 2), asks=build.end, want=build.end, offer=any_of(words), value=names, write=out,
        bar=(any_of(out), any_of(words)),
    )  # fmt: skip
    distract(build, (0, 2))
    return make(
        "backup_head", finish(build, out=out, scale=_SCALE), *_with_or_without(n),
        truth={"primary": [(0, 1)], "backup": [(1, 2)]},
        where={"primary": "end", "backup": "end"},
        edges=[
            ("input", "a0.h1<v>"), ("a0.h1", "logits"), ("a0.h1", "a1.h2<q>"), ("input", "a1.h2<v>"),
            ("a1.h2", "logits"),
        ],
    )  # fmt: skip


def saturation() -> Planted:
    """An MLP that is past its ceiling: the gradient at the clean prompt is 0, and the effect of patching is 1.

    From the end head (1, 1) copies the one word of the prompt three times over into "x". For each answer two neurons of
    the MLP of layer 1 write relu(x + 1/2) - relu(x - 1/2), which is x + 1/2 up to x = 1/2 and 1 from there on.

    Corrupt prompts have a word that names nothing, x = 0. The gradient there is six times too large (the ceiling is
    reached at a sixth of the way), and the mean of the gradients along the way is right. For a softmax that
    is saturated, see `induction_like`.

    Returns:
        The Planted, with 9 prompts of 5 tokens; positions "word", "end".
    """
    n = 3
    build = blank(2, 3, n_words=n + 1, n_neurons=2 * n, x=n, out=n, junk=n)
    x, out = build["x"], build["out"]
    read_from_end(build, (1, 1), build.words, value=build.words[:n], write=3 * x)
    neurons(build, 1, read=torch.cat([x, x]), bias=torch.tensor([0.5] * n + [-0.5] * n), write=torch.cat([out, -out]))
    distract(build, (0, 2))
    return make(
        "saturation", finish(build, out=out, scale=_SCALE), *_with_or_without(n),
        truth={"reader": [(1, 1)]},
        where={"reader": "end"},
        mlps=(1,),
        edges=[("input", "a1.h1<v>"), ("a1.h1", "m1"), ("m1", "logits")],
    )  # fmt: skip


def greater_than_like() -> Planted:
    """Years: the logits of all years later than the one of the prompt are raised, by a threshold in an MLP.

    The words stand for the years 0 to 7. From the end head (1, 0) writes the year y of the prompt, as a number, into
    "year". Neuron t of the MLP of layer 1 (t = 1 to 7) computes h_t = relu(t - 1/2 - y). Year t gets h_t - h_(t-1),
    which is 1 for t > y + 1, 1/2 for t = y + 1 and 0 for t <= y.

    Clean prompts have a year y of 2 to 5; the answer is y + 2 (all later ones are as good) and the wrong answer y.
    Corrupt prompts have the year 0, after which both are allowed. The head and the MLP have the effect 1.

    Returns:
        The Planted, with 12 prompts of 5 tokens; positions "year", "end".
    """
    n = 8
    build = blank(2, 3, n_words=n, n_neurons=n - 1, year=1, out=n, junk=n)
    years = torch.arange(n, dtype=torch.float32)
    read_from_end(build, (1, 0), build.words, value=years[None] @ build.words, write=build["year"])
    out = build["out"]
    later = torch.cat([out[2:], out[:1] * 0])  # after the last year there is none to take from
    neurons(build, 1, read=-build["year"].expand(n - 1, -1), bias=years[1:] - 0.5, write=out[1:] - later)
    distract(build, (0, 1))
    cases = [(year, place) for year in range(2, n - 2) for place in (1, 2, 3)]
    return make(
        "greater_than_like", finish(build, out=out, scale=_SCALE),
        [prompt(5, {place: year}) for year, place in cases], [prompt(5, {place: 0}) for _, place in cases],
        [WORDS + year + 2 for year, _ in cases], [WORDS + year for year, _ in cases],
        positions={"year": [place for _, place in cases]},
        truth={"reader": [(1, 0)]},
        where={"reader": "end"},
        mlps=(1,),
        edges=[("input", "a1.h0<v>"), ("a1.h0", "m1"), ("m1", "logits")],
    )  # fmt: skip


def _gate(kind: Literal["or", "and"]) -> Planted:
    n = 3
    build = blank(2, 3, n_words=2 * (n + 1), n_neurons=n + 1, a=n, b=n, out=n, junk=n)
    first, second, out = build.words[: n + 1], build.words[n + 1 :], build["out"]
    read_from_end(build, (0, 1), first, value=first[:n], write=build["a"])
    read_from_end(build, (1, 2), second, value=second[:n], write=build["b"])
    both = build["a"] + build["b"]
    if kind == "or":
        bias = torch.tensor([1.0] * n + [0.0])
        neurons(build, 1, read=torch.cat([-both, build["one"]]), bias=bias, write=torch.cat([-out, any_of(out)]))
    else:
        neurons(build, 1, read=both, bias=-1.0, write=out)
    distract(build, (0, 2))
    cases = [(i, a, b) for i in range(n) for a, b in permutations((1, 2, 3), 2)]
    return make(
        f"{kind}_gate", finish(build, out=out, scale=_SCALE),
        [prompt(5, {a: i, b: n + 1 + i}) for i, a, b in cases],
        [prompt(5, {a: n, b: 2 * n + 1}) for _, a, b in cases],
        [WORDS + i for i, _, _ in cases], [WORDS + (i + 1) % n for i, _, _ in cases],
        positions={"a": [a for _, a, _ in cases], "b": [b for _, _, b in cases]},
        truth={"a": [(0, 1)], "b": [(1, 2)]},
        where={"a": "end", "b": "end"},
        mlps=(1,),
        edges=[("input", "a0.h1<v>"), ("input", "a1.h2<v>"), ("a0.h1", "m1"), ("a1.h2", "m1"), ("m1", "logits")],
    )  # fmt: skip


def _require_sharp(sharpness: float) -> None:
    if not 1 <= sharpness <= 100:
        raise ValueError(
            f"sharpness={sharpness}: it is from 1 (below, the model gives wrong answers) to 100 (above, scores are too "
            "large to be exact in float32)."
        )


def _with_or_without(
    n: int,
) -> tuple[list[list[int]], list[list[int]], list[int], list[int], dict[str, list[int]]]:
    """Prompts with one of n words at one of three positions; corrupt, word n, which names nothing."""
    cases = [(i, place) for i in range(n) for place in (1, 2, 3)]
    return (
        [prompt(5, {place: i}) for i, place in cases],
        [prompt(5, {place: n}) for _, place in cases],
        [WORDS + i for i, _ in cases],
        [WORDS + (i + 1) % n for i, _ in cases],
        {"word": [place for _, place in cases]},
    )
