from __future__ import annotations

import re

import pytest
import torch

from interp.tasks import ioi
from interp.tasks._prompts import column

NAMES = frozenset(column("names", "name"))


def read(prompt: str) -> tuple[list[str], str]:
    """The names of a prompt in order, and the prompt with each of them blanked: an own reading of the text."""
    return [w for w in re.findall(r"\w+", prompt) if w in NAMES], re.sub(
        r"\w+", lambda hit: "_" if hit[0] in NAMES else hit[0], prompt
    )


def decoded(model, task, ids):
    masks = torch.ones_like(ids) if task.mask is None else task.mask
    return [model.tokenizer.decode(row[mask == 1].tolist()) for row, mask in zip(ids, masks, strict=True)]


def answers(model, task):
    return [[t.strip() for t in model.to_str_tokens(ids)] for ids in (task.answers, task.wrong)]


@pytest.mark.parametrize("corrupt", ["abc", "swap"])
def test_every_prompt_is_what_it_says(words, corrupt):
    task = ioi(words, 100, corrupt=corrupt)
    right, wrong = answers(words, task)
    assert decoded(words, task, task.clean) == list(task.prompts)
    assert len(set(task.prompts)) == 100
    for clean, other, io, s in zip(task.prompts, decoded(words, task, task.corrupt), right, wrong, strict=True):
        names, frame = read(clean)
        changed, other_frame = read(other)
        assert frame == other_frame, "only names differ"
        assert sorted(names) == sorted([io, s, s])
        assert names[2] == s
        assert clean.endswith(" to")
        if corrupt == "swap":
            assert changed == [*names[:2], io]
        else:
            assert len({*changed, io, s}) == 5, "three other names, all different"


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_named_positions_hold_the_names_also_behind_padding(words, prepend_bos):
    task = ioi(words, 40, prepend_bos=prepend_bos)
    assert task.mask is not None and 0 in task.mask, "the toy tokenizer makes some templates longer"
    right, wrong = answers(words, task)
    row = torch.arange(40)
    at = {k: [t.strip() for t in words.to_str_tokens(task.clean[row, v])] for k, v in task.positions.items()}
    assert at["indirect_object"] == right
    assert at["subject1"] == at["subject2"] == wrong
    assert bool((task.positions["subject1"] < task.positions["subject2"]).all())
    assert bool((task.positions["after_subject1"] == task.positions["subject1"] + 1).all())
    assert set(at["end"]) == {"to"}
    assert set(task.positions) == {"indirect_object", "subject1", "after_subject1", "subject2", "end"}


def test_orders(words):
    for order, io_first in (("ABBA", [True] * 20), ("BABA", [False] * 20), ("both", [True, False] * 10)):
        task = ioi(words, 20, order=order)
        names = [read(prompt)[0] for prompt in task.prompts]
        assert [first != third for first, _, third in names] == io_first
        position = task.positions
        assert (position["indirect_object"] < position["subject1"]).tolist() == io_first
    frames = {read(prompt)[1].split()[0] for prompt in ioi(words, 20).prompts}
    assert len(frames) == 8, "all templates take part"


def test_seeds(words):
    assert ioi(words, 16, seed=1).fingerprint == ioi(words, 16, seed=1).fingerprint
    assert ioi(words, 16, seed=1).fingerprint != ioi(words, 16, seed=2).fingerprint
    assert ioi(words, 16, seed=1, corrupt="swap").prompts == ioi(words, 16, seed=1).prompts


def test_words_that_the_tokenizer_lacks_are_left_out_and_counted(make_model):
    gone = sorted(NAMES)[::2]
    task = ioi(make_model(unknown=[*gone, "school", "ball", "ring"]), 200)
    assert f"names {138 - len(gone)} of 138, places 37 of 38, objects 46 of 48" in task.source
    assert not {word for prompt in task.prompts for word in re.findall(r"\w+", prompt)} & {*gone, "school", "ball"}


def test_refusals_say_the_numbers(make_model, words):
    four = make_model(unknown=sorted(NAMES)[4:])
    with pytest.raises(ValueError, match=r"names 4 of 138.*it takes five names"):
        ioi(four)
    few = make_model(
        unknown=sorted(NAMES)[5:] + column("ioi_places", "place")[1:] + column("ioi_objects", "object")[2:]
    )
    task = ioi(few, 40)  # 5 x 4 pairs, 1 place, 2 objects
    for clean, corrupt in zip(task.prompts, decoded(few, task, task.corrupt), strict=True):
        assert {*read(clean)[0], *read(corrupt)[0]} == set(sorted(NAMES)[:5])
    with pytest.raises(ValueError, match="n_prompts=41, but only 40 different prompts"):
        ioi(few, 41)
    with pytest.raises(ValueError, match="n_prompts=0"):
        ioi(words, 0)
    with pytest.raises(ValueError, match="order='AB' is not known; use one of 'ABBA'"):
        ioi(words, order="AB")
    with pytest.raises(ValueError, match="corrupt='abd' is not known"):
        ioi(words, corrupt="abd")
    with pytest.raises(ValueError, match="words is a encoder model: load a decoder|words is an encoder model"):
        ioi(make_model(kind="encoder"))
    with pytest.raises(ValueError, match="context of 10"):
        ioi(make_model(n_ctx=10))


def test_the_default_model_does_it(smol):
    task = ioi(smol, 32)
    assert task.mask is None, "all templates are 15 tokens of the default tokenizer"
    assert task.clean.shape == (32, 15)
    gap = {}
    for name, ids in (("clean", task.clean), ("corrupt", task.corrupt)):
        logits = smol(ids)[:, -1]
        gap[name] = (logits.gather(1, task.answers[:, None]) - logits.gather(1, task.wrong[:, None]))[:, 0]
    # Measured: 98% prefer the IO, by 5.3 logits; with three other names the two are alike (-0.4).
    assert (gap["clean"] > 0).float().mean() >= 0.8
    assert gap["clean"].mean() > 2
    assert gap["corrupt"].mean().abs() < 1.5
    swapped = ioi(smol, 32, corrupt="swap")
    logits = smol(swapped.corrupt)[:, -1]
    assert (logits.gather(1, task.answers[:, None]) < logits.gather(1, task.wrong[:, None])).float().mean() >= 0.8
