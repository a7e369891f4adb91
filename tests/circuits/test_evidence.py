"""What heads attend to and copy: hooks spelled out, planted heads, padding, grouped values, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.circuits import evidence
from interp.models import planted, run, toy
from interp.models.program import NoProgramError
from interp.tasks.induction import induction
from interp.tasks.task import Task


def doc(model, n=3, length=9, *, padded=False, seed=0) -> Task:
    tokens = toy.random_tokens(model, n, length, seed=seed)
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        for row in range(n):
            mask[row, :row] = 0
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(length - 3, generator=generator)[:2] + 3 for _ in range(n)])
    positions = {"early": places.min(1).values, "late": places.max(1).values, "end": torch.full((n,), length - 1)}
    return Task("doc", ("",) * n, tokens, "random", positions=positions, mask=mask)


def ioi_task(case: planted.Planted) -> Task:
    return Task(
        "ioi", case.prompts, case.clean, "planted", case.corrupt, case.answers, case.wrong, positions=case.positions
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_the_entry_of_the_pattern(architecture, padded):
    model = toy.random(architecture)
    task = doc(model, padded=padded)
    found = evidence.attention(model, task, [("end", "early"), ("late", "early"), ("end", "end")]).table
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.n_layers)]
    cache = run(model, task.clean, capture=names, mask=task.mask).cache
    assert len(found) == 3 * 3 * model.n_layers * model.n_heads
    assert found["value"].nunique() > 60
    for row in found.to_dict("records"):
        q, k = (int(task.positions[row[side]][row["prompt"]]) for side in ("src", "dst"))
        expected = cache[names[row["layer"]]][row["prompt"], row["head"], q, k]
        # The same forward pass but for its last steps: equal to float32's last digit.
        assert row["value"] == pytest.approx(float(expected), abs=1e-6)


def test_planted_heads_attend_where_they_were_told():
    case = planted.ioi_like(sharpness=20.0)
    pairs = [("s2", "s1"), ("end", "s2"), ("end", "io"), ("end", "s1")]
    means = evidence.attention(case.model, ioi_task(case), pairs).summary(by=["src", "dst", "layer", "head"])
    means = means.set_index(["src", "dst", "layer", "head"])["mean"]
    # A match outscores everything else by 20, and exp(-20) is 2e-9.
    assert means["s2", "s1", 0, 1] == pytest.approx(1, abs=1e-6)
    assert means["end", "s2", 1, 0] == pytest.approx(1, abs=1e-6)
    for head in (1, 2, 3):
        assert means["end", "io", 2, head] == pytest.approx(1, abs=1e-6)
        assert means["end", "s1", 2, head] == pytest.approx(0, abs=1e-6)


def test_random_tokens_show_the_heads_of_induction():
    found = evidence.repeated_tokens(toy.induction(), n_prompts=4, length=5, seed=3)
    best = {kind: found.filter(metric=kind).grid("layer", "head") for kind in found.table["metric"].unique()}
    # Attention of the toy is sharp: a match scores 60 above anything else.
    assert best["induction"].loc[1, 0] == pytest.approx(1, abs=1e-3)
    assert best["previous token"].loc[0, 0] == pytest.approx(1, abs=1e-3)
    for kind, layer, head in (("induction", 0, 0), ("previous token", 1, 0), ("duplicate token", 0, 0)):
        assert best[kind].loc[layer, head] < 0.33  # where nothing matches, attention is even over 2 to 5 positions
    # The idle heads attend evenly, so that position p of L..2L-2 gives 1 / (p + 1), and p of 1..L-1 too.
    assert best["induction"].loc[0, 1] == pytest.approx(np.mean([1 / (p + 1) for p in range(5, 9)]), rel=1e-5)
    assert best["previous token"].loc[0, 1] == pytest.approx(np.mean([1 / (p + 1) for p in range(1, 5)]), rel=1e-5)


def test_random_tokens_show_a_duplicate_token_head():
    case = planted.ioi_like(sharpness=20.0)
    found = evidence.repeated_tokens(case.model, n_prompts=40, length=3).filter(metric="duplicate token")
    # 4 of the 6 tokens drawn are names, which the head finds; from the others it attends evenly to 4 or 5 positions.
    expected = 4 / 6 + 2 / 6 * (1 / 4 + 1 / 5) / 2
    assert found.grid("layer", "head").loc[0, 1] == pytest.approx(expected, abs=0.08)  # 80 draws: 0.05 is one s.e.
    assert found.summary(by=["layer", "head"]).sort_values("mean").iloc[-1][["layer", "head"]].tolist() == [0, 1]


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_random_tokens_equal_the_pattern_entry_by_entry(architecture):
    model, length = toy.random(architecture), 6
    found = evidence.repeated_tokens(model, n_prompts=2, length=length, seed=5).table
    task = induction(model, 2, length, seed=5)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.n_layers)]
    cache = run(model, task.clean, capture=names, mask=task.mask).cache
    start = int(task.positions["repeat"][0])
    tokens = task.clean[0].tolist()
    for row in found.to_dict("records"):
        pattern = cache[names[row["layer"]]][row["prompt"], row["head"]]
        if row["metric"] == "previous token":
            cells = [(p, p - 1) for p in range(start - length + 1, start)]
        else:  # where the same token stood before, by looking for it
            ahead = int(row["metric"] == "induction")
            line = task.clean[row["prompt"]].tolist()
            cells = [(p, line.index(line[p]) + ahead) for p in range(start, len(tokens))]
        expected = np.mean([float(pattern[q, k]) for q, k in cells])
        assert row["value"] == pytest.approx(expected, abs=1e-6)  # a mean of ten float32 numbers, in another order


@pytest.mark.parametrize(
    ("architecture", "weights"), [("llama", "processed"), ("gpt2", "raw"), ("gpt2", "processed"), ("gemma", "raw")]
)
def test_copying_is_the_model_with_the_head_alone(architecture, weights):
    """The head's values of the state, through its output map, as the final stream: all with the model's own hooks."""
    model = toy.random(architecture, weights=weights)
    task = doc(model, n=3, padded=True)
    heads = [(0, 0), (2, 1), (2, 3)]
    found = evidence.copying(model, task, heads, names=["early", "late"], top=9).table
    assert found["value_rank"].nunique() > 8
    stream = run(model, task.clean, capture=["blocks.0.hook_resid_post"], mask=task.mask).cache[
        "blocks.0.hook_resid_post"
    ]
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    for row in found.to_dict("records"):
        prompt, layer, head = row["prompt"], row["layer"], row["head"]
        place = int(task.positions[row["src"]][prompt])
        v_name, z_name, out_name = (f"blocks.{layer}.{x}" for x in ("attn.hook_v", "attn.hook_z", "hook_attn_out"))

        def give(name, value):
            return (name, lambda a, hook: value.expand_as(a))

        only = task.clean[prompt : prompt + 1]
        start = give(f"blocks.{layer}.hook_resid_pre", stream[prompt, place])
        v = run(model, only, hooks=[start], capture=[v_name]).cache[v_name][0, 0]
        z = torch.zeros(model.n_heads, model.d_head)
        written = []
        for fill in (0, 1):
            z[head] = fill * v[head * model.n_key_value_heads // model.n_heads]
            written.append(run(model, only, hooks=[start, give(z_name, z.clone())], capture=[out_name]).cache[out_name])
        alone = (written[1] - written[0])[0, 0]
        logits = run(model, only, hooks=[give(last, alone * (1 if row["metric"] == "copy" else -1))]).logits[0, -1]
        own = logits[task.clean[prompt, place]]
        # Two logits 1e-5 apart may change places between the two ways of computing them.
        assert int((logits > own + 1e-5).sum()) <= row["value_rank"] <= int((logits > own - 1e-5).sum())
        assert row["value"] == float(row["value_rank"] < 9)


def test_planted_movers_copy_and_the_negative_head_does_the_reverse():
    case = planted.ioi_like()
    heads = [(2, 0), (2, 1), (2, 2), (2, 3), (0, 3)]
    found = evidence.copying(case.model, ioi_task(case), heads, names=["io", "s1"], top=1)
    rates = found.summary(by=["metric", "layer", "head"]).set_index(["metric", "layer", "head"])["mean"]
    assert rates["copy"].to_dict() == {(0, 3): 0, (2, 0): 0, (2, 1): 1, (2, 2): 1, (2, 3): 0}
    # A head that writes nothing, or what nothing reads, leaves all logits equal, and a tie counts against it.
    assert rates["anti-copy"].to_dict() == {(0, 3): 0, (2, 0): 0, (2, 1): 0, (2, 2): 0, (2, 3): 1}


def test_a_norm_after_attention_leaves_no_head_a_part_of_its_own():
    model = toy.random("gemma2")
    with pytest.raises(NoProgramError, match="normalises attention's output: no head writes a part of its own"):
        evidence.copying(model, doc(model), [(1, 0)], names=["end"])


def test_bad_input_is_told_what_to_do():
    model = toy.random("llama")
    task = doc(model)
    with pytest.raises(ValueError, match=r"no position 'subject'; it has early, end, late"):
        evidence.attention(model, task, [("end", "subject")])
    with pytest.raises(ValueError, match="name at least one"):
        evidence.attention(model, task, [])
    with pytest.raises(ValueError, match=r"head \(3, 0\) is not one of .* layers 0 to 2, heads 0 to 3"):
        evidence.copying(model, task, [(3, 0)], names=["end"])
    with pytest.raises(ValueError, match="at least one head"):
        evidence.copying(model, task, [], names=["end"])
    with pytest.raises(ValueError, match="length=60"):
        evidence.repeated_tokens(model, length=60)
