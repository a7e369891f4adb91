"""Descriptors on mappings whose kind is known and on a planted copying head; the prompt and its answers."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from interp.core.result import Result
from interp.models import load, toy
from interp.weights import describe
from interp.weights.describe import DESCRIPTORS, descriptors, explain, prompt, write
from interp.weights.salient import mappings


def made(pairs, ids=None):
    """Mappings of head (1, 0) with these texts."""
    ids = ids or [(i + 2, i + 2) for i in range(len(pairs))]
    table = pd.DataFrame({
        "layer": 1, "head": 0, "src": [a for a, _ in pairs], "dst": [b for _, b in pairs], "value": 1.0,
        "value_source": [a for a, _ in ids], "value_target": [b for _, b in ids],
    })  # fmt: skip
    return Result("salient.mappings", table, "logits")


def shares(model, pairs, column="value", **options):
    return descriptors(model, made(pairs), **options).table.set_index("metric")[column].to_dict()


def test_each_kind_is_told_from_the_others(toys):
    model = toys("llama", weights="raw")
    found = shares(model, [(" walk", "walk"), (" Paris", " paris"), (" dog", " deer"), (" sun", " moon")])
    assert found == {
        "copy": 0.25,
        "copy up to case": 0.5,
        "first letter": 0.75,
        "prefix": 0,
        "suffix": 0,
        "neighbour": 0,
    }
    found = shares(model, [(" unhappy", " undo"), (" walking", " Walker"), (" singing", " doing"), (" go", " go")])
    assert (found["prefix"], found["suffix"]) == (0.25, 0.25)  # three letters; a copy shares no affix
    found = shares(model, [("", ""), (" ", "a")])
    assert found["first letter"] == 0 and found["copy"] == 0.5


def test_chance_is_the_share_of_shuffled_mappings(toys):
    model = toys("llama", weights="raw")
    letters = [(f" {letter}one", f" {letter}two") for letter in "abcdefgh"]
    observed, chance, p = (
        shares(model, letters, column, n_permutations=400)["first letter"]
        for column in ("value", "value_control", "value_p")
    )
    # One of eight targets begins as the source does.
    assert observed == 1.0 and chance == pytest.approx(1 / 8, abs=0.03) and p < 0.01
    # All with one letter: no more than chance, whatever the share.
    same = [(f" a{i}", f" a{i + 1}") for i in range(8)]
    observed, chance, p = (
        shares(model, same, column)["first letter"] for column in ("value", "value_control", "value_p")
    )
    assert observed == chance == p == 1.0


def test_neighbours_are_those_of_the_embedding(toys):
    model = toys("llama", weights="raw")
    rows = torch.nn.functional.normalize(model.bridge.embed.W_E.detach(), dim=1)
    nearest = [(i, int((rows @ rows[i]).topk(3).indices[1])) for i in range(5, 15)]  # [0] is the token itself
    farthest = [(i, int((rows @ rows[i]).argmin())) for i in range(5, 15)]
    for ids, share in ((nearest, 1.0), (farthest, 0.0), ([(i, i) for i in range(5, 15)], 0.0)):
        result = descriptors(model, made([("a", "b")] * 10, ids), n_neighbours=2)
        assert result.filter(metric="neighbour").table["value"].item() == share


def test_a_planted_copying_head_is_described_as_one():
    module = toy.random_module("gpt2", scale=0.02)
    with torch.no_grad():
        attention = module.transformer.h[0].attn
        attention.c_attn.weight[:, 64:].zero_()
        attention.c_proj.weight.zero_()
        module.transformer.wte.weight.zero_()
        module.transformer.wte.weight[:32] = torch.eye(32)
        for head, sign in ((1, 1.0), (2, -1.0)):
            there, out = range(64 + 8 * head, 72 + 8 * head), range(8 * head, 8 * head + 8)
            attention.c_attn.weight[range(8, 16), there] = 1.0
            attention.c_proj.weight[out, range(8, 16)] = sign
    model = load(module, tokenizer=toy.tokenizer(), weights="raw")
    found = mappings(model, [(0, 1), (0, 2)], n_tokens=8, k=1)
    assert sorted(found.filter(head=1).table["src"]) == sorted(f"w{i}" for i in range(8, 16))
    table = descriptors(model, found).table.set_index(["head", "metric"])
    assert table.loc[(1, "copy"), "value"] == 1.0 and table.loc[(1, "copy"), "value_p"] < 0.02
    assert table.loc[(2, "copy"), "value"] == 0.0
    assert list(table.loc[1].index) == list(DESCRIPTORS)


def test_the_prompt_quotes_tokens_and_keeps_their_order():
    asked = prompt(made([(" cat", "\n"), (" cat", '"'), (" dog", " {x}")], [(5, 6), (5, 7), (8, 9)]), (1, 0))
    lines = [line for line in asked.splitlines() if " -> " in line]
    assert lines == ['" cat" -> "\\n", "\\""', '" dog" -> " {x}"']
    assert '"Observed pattern"' in asked
    with pytest.raises(ValueError, match="no mappings of head"):
        prompt(made([("a", "b")]), (0, 0))


@pytest.mark.parametrize(
    ("answer", "pattern", "value"),
    [
        ('{"Reasoning": "r", "Observed pattern": " plural "}', "plural", 1.0),
        ('Sure! {not json} {"Observed pattern": "plural"} {"Observed pattern": "b"}', "plural", 1.0),
        ('{"Observed pattern": "Unclear"}', "Unclear", 0.0),
        ('{"Observed pattern": 3}', "", 0.0),
        ("no idea", "", 0.0),
    ],
)
def test_answers_are_read_and_kept(answer, pattern, value):
    seen = []
    result = explain(made([("a", "b")]), [(1, 0)], writer=lambda text: seen.append(text) or answer)
    assert result.table[["layer", "head", "target", "value", "token"]].values.tolist() == [
        [1, 0, pattern, value, answer]
    ]
    assert seen == [prompt(made([("a", "b")]), (1, 0))]
    assert json.dumps(describe._pattern(answer)) == json.dumps(pattern)


def test_text_is_written_as_the_huggingface_model_writes_it(smol_raw):
    text = "The capital of France is"
    ids = smol_raw.tokenize(text).ids
    module = smol_raw.bridge.original_model
    said = []
    for _ in range(6):
        with torch.no_grad():
            following = module(torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)).logits[0, -1].argmax()
        said.append(int(following))
    ours = write(smol_raw, text, max_new_tokens=6)
    assert ours == smol_raw.tokenizer.decode(said) and "Paris" in ours
    result = explain(made([(" cat", " cats")]), [(1, 0)], writer=lambda asked: write(smol_raw, asked, max_new_tokens=3))
    assert len(result.table["token"][0]) > 0


def test_writing_stops_at_the_end_of_text_and_of_the_context():
    model = toy.induction()  # "<bos> w2 <eos>": what followed "w2" is repeated
    assert write(model, "<bos> w2 <eos> w3 w2", max_new_tokens=5).strip() == ""
    assert write(model, "<bos> w2 w3 w4 w2", max_new_tokens=2).split() == ["w3", "w4"]
    assert len(write(model, " ".join(["w2", "w3"] * 11), max_new_tokens=50).split()) == 2  # of 24 positions
    with pytest.raises(ValueError, match="fills the context of 24"):
        write(model, " ".join(["w2"] * 24))
