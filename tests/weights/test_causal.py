"""Ablation of relation heads: planted ones, brute force with hooks, and the sums of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from interp.core.result import Result
from interp.models import load, toy
from interp.models.hooks import run
from interp.models.program import hook_name
from interp.tasks import Relation, Relations
from interp.weights import causal
from interp.weights.causal import CONTROL, OWN, RANDOM, ablation_curves, link
from interp.weights.maps import relation_scores

N_WORDS = 24
FIRST = [(4, 14), (5, 15), (6, 16), (7, 17)]
SECOND = [(8, 20), (9, 21), (10, 22), (11, 23)]


def relation_heads():
    """One layer of four heads that see all positions alike: head 0 holds half of the first relation, head 2 the other
    half, head 1 the second relation, and head 3 nothing. Token 0 is said where no head writes."""
    import transformers

    width = 4 * N_WORDS
    config = transformers.GPT2Config(
        n_layer=1, n_head=4, n_embd=width, n_inner=4, vocab_size=N_WORDS, n_positions=64, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        module.transformer.wte.weight[:, :N_WORDS] = torch.eye(N_WORDS)
        module.transformer.wte.weight[:, -1] = 0.2
        module.lm_head.weight[:, N_WORDS : 2 * N_WORDS] = torch.eye(N_WORDS)
        module.lm_head.weight[0, -1] = 0.2
        attention = module.transformer.h[0].attn
        for head, pairs in ((0, FIRST[:2]), (2, FIRST[2:]), (1, SECOND)):
            for source, target in pairs:
                attention.c_attn.weight[source, 2 * width + head * N_WORDS + source] = 1.0
                attention.c_proj.weight[head * N_WORDS + source, N_WORDS + target] = 1.0
    return load(module.eval(), tokenizer=toy.tokenizer(N_WORDS), weights="raw")


@pytest.fixture(scope="module")
def planted():
    model = relation_heads()
    relations = Relations(tuple(
        Relation.from_pairs(model, name, [(f"w{s}", f"w{t}") for s, t in pairs], templates=["w2 w3 {source}"])
        for name, pairs in (("first", FIRST), ("second", SECOND))
    ))  # fmt: skip
    return model, relations, relation_scores(model, relations, k=1, embedding="raw")


def means(curves):
    return curves.table.groupby(["target", "src", "component", "step"])["value"].mean().to_dict()


def test_planted_heads(planted):
    model, relations, scores = planted
    curves = ablation_curves(model, relations, scores, counts=[1, 2])
    assert means(curves) == {
        ("first", "first", OWN, 0): 1.0,
        ("first", "first", OWN, 1): 0.5,
        ("first", "first", OWN, 2): 0.0,
        ("first", "first", RANDOM, 1): 1.0,
        ("first", "first", RANDOM, 2): 1.0,
        ("second", "second", OWN, 0): 1.0,
        ("second", "second", OWN, 1): 0.0,
        ("second", "second", RANDOM, 1): 1.0,
        ("first", "second", CONTROL, 1): 1.0,
        ("second", "first", CONTROL, 2): 1.0,
    }
    assert curves.meta["heads"] == {"first": [[0, 0], [0, 2]], "second": [[0, 1]]}
    assert curves.meta["removed"] == {"first": 2, "second": 1} and curves.meta["dropped"] == {}
    found = link(curves).table.pivot(index="metric", columns="target", values=["value", "value_low", "value_high"])
    assert (found.loc["difference"] == 1.0).all() and (found.loc["without its heads"] == 0.0).all()
    assert (found.loc["controls, without its heads"] == 1.0).all()


def test_a_relation_that_is_not_done_is_left_out(planted):
    model, relations, scores = planted
    wrong = Relation.from_pairs(model, "wrong", [(f"w{s}", f"w{t - 1}") for s, t in FIRST], templates=["w2 {source}"])
    both = Relations((relations["second"], wrong))
    table = scores.table.assign(target=scores.table["target"].replace("first", "wrong"))
    curves = ablation_curves(model, both, replace(scores, table=table))
    assert curves.meta["relations"] == ["second"] and curves.meta["dropped"] == {"wrong": 0.0}
    assert set(curves.table["target"]) == {"second"}
    summed = link(curves).table.set_index("metric")
    assert summed.loc["controls, all heads", ["value", "value_low"]].isna().all()
    with pytest.raises(ValueError, match=r"does none of these relations \(accuracy wrong 0.00"):
        ablation_curves(model, Relations((wrong,)), replace(scores, table=table))


def test_any_right_target_is_right(planted):
    model, _, scores = planted
    pairs = [("w4", "w14"), ("w4", "w9"), ("w5", "w9"), ("w5", "w15"), ("w6", "w9")]
    own = Relations((Relation.from_pairs(model, "first", pairs, templates=["w2 {source}"]),))
    curves = ablation_curves(model, own, scores)
    base = curves.filter(component=OWN, step=0).table
    assert base["value"].tolist() == [1.0, 1.0, 0.0]  # a prompt a source


def predicted(model, template, sources):
    """The relation of what a random model says."""
    tokens = model.tokenize([template.replace("{source}", f"w{s}") for s in sources]).ids
    said = model(tokens)[:, -1].argmax(-1).tolist()
    return [(f"w{s}", f"w{t}") for s, t in zip(sources, said, strict=True) if t > 1]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma", "gpt_neox"])
def test_equals_a_forward_pass_for_each_run(architecture, toys):
    model = toys(architecture, weights="raw")
    templates = {"one": "w5 w9 {source} w7", "other": "w3 {source}"}
    relations = Relations(tuple(
        Relation.from_pairs(model, name, predicted(model, template, range(2, 22)), templates=[template])
        for name, template in templates.items()
    ))  # fmt: skip
    scores = relation_scores(model, relations, k=2)
    options = {"counts": [1, 3, 6], "n_random": 2, "seed": 3}
    curves = ablation_curves(model, relations, scores, **options)
    for relation in relations:
        heads = [tuple(head) for head in curves.meta["heads"][relation.name]]
        order = scores.filter(target=relation.name, metric="promotes").table.sort_values(
            ["value", "layer", "head"], ascending=[False, True, True]
        )
        positive = order[order["value"] > 0]
        assert heads == list(zip(positive["layer"], positive["head"], strict=True))
        tokens = model.tokenize([templates[relation.name].replace("{source}", pair.source) for pair in relation.pairs])
        for each in causal._runs(model, relation.name, heads, options["counts"], 2, 3):
            removed = {layer: [h for at, h in each.heads if at == layer] for layer, _ in each.heads}

            def zero(layer, removed=removed):
                def put(z, hook):
                    z = z.clone()
                    z[:, -1, removed[layer]] = 0.0
                    return z

                return hook_name("z", layer), put

            logits = run(model, tokens.ids, hooks=[zero(layer) for layer in removed]).logits[:, -1]
            expected = (logits.argmax(-1) == relation.target_ids).float().tolist()
            own = curves.filter(
                target=relation.name, src=relation.name, component=each.component, step=each.step, value_draw=each.draw
            )
            assert own.table.sort_values("prompt")["value"].tolist() == expected
            if each.component == RANDOM:
                assert not set(each.heads) & set(heads)
    assert len(curves.filter(component=RANDOM).table)
    assert means(curves)["one", "one", OWN, 0] == 1.0 and curves.table["value"].mean() < 1.0
    hooked = ablation_curves(model, relations, scores, **options, exact_path="hooks")
    pd.testing.assert_frame_equal(hooked.table, curves.table)


def test_batches_relations_and_interruptions_change_nothing(toys, monkeypatch):
    model = toys("llama", weights="raw")
    made = [
        Relation.from_pairs(model, name, predicted(model, template, range(2, 30)), templates=[template])
        for name, template in (("one", "w5 w9 {source} w7"), ("other", "w3 {source}"))
    ]
    relations = Relations(tuple(made))
    scores = relation_scores(model, relations, k=2)
    whole = ablation_curves(model, relations, scores)
    pd.testing.assert_frame_equal(ablation_curves(model, relations, scores, batch_size=5).table, whole.table)
    alone = ablation_curves(model, Relations((made[1],)), scores).table
    same = whole.table[(whole.table["target"] == "other") & (whole.table["src"] == "other")]
    pd.testing.assert_frame_equal(alone, same.reset_index(drop=True))
    calls, compute = [], causal._answered

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(causal, "_answered", stops)
    with pytest.raises(KeyboardInterrupt):
        ablation_curves(model, relations, scores)
    pd.testing.assert_frame_equal(ablation_curves(model, relations, scores).table, whole.table)
    assert len(calls) == 3 + len({each for own in whole.meta["controls"].values() for each in own})
    assert not ablation_curves(model, relations, scores, seed=1).table.equals(whole.table)


def test_which_relations_are_controls():
    order = {"a": [(0, i) for i in range(10)], "b": [(0, 0), *((1, i) for i in range(9))], "c": [(2, 0)] * 10}
    order |= {"d": [(0, 9), (0, 8), *((3, i) for i in range(8))], "e": [(4, 0)]}
    base = {"a": 0.9, "b": 0.8, "c": 0.75, "d": 0.9, "e": 0.65}
    names = list(order)
    assert causal._controls("a", names, base, order, 10, 5) == ["c", "b"]  # d shares 2 of 10, e does too badly
    assert causal._controls("a", names, base, order, 10, 1) == ["c"]
    assert causal._controls("a", names, base, order, 8, 5) == ["d", "c", "b"]  # the first eight of each


def test_at_most_so_many_heads_and_the_first_that_leaves_nothing(planted):
    model = planted[0]
    table = pd.DataFrame({"target": "a", "metric": "promotes", "layer": 0, "head": range(400), "value": 0.5})
    scores = Result("maps.relation_scores", table, "share of pairs")
    for layers, most in ((1, 30), (100, 50), (125, 100), (374, 150)):
        assert len(causal._heads(replace(model, n_layers=layers), "a", scores)) == most  # of four heads each
    assert len(causal._heads(replace(model, n_layers=375), "a", scores)) == 250
    frame = pd.DataFrame({"component": OWN, "step": [0, 1, 2, 3], "value": [1.0, 0.0, 0.5, 0.0]})
    assert causal._emptied(frame) == 1
    assert causal._emptied(frame.assign(value=1.0)) == 3


def curves_of(own, random, base):
    """Curves of one relation from its answers `[prompt]`, `[draw prompt]`, `[prompt]`."""
    rows = [
        pd.DataFrame({"component": component, "step": step, "value_draw": draw, "prompt": range(len(v)), "value": v})
        for component, step, draw, v in [(OWN, 0, 0, base), (OWN, 2, 0, own)]
        + [(RANDOM, 2, i, each) for i, each in enumerate(random)]
    ]
    table = pd.concat(rows, ignore_index=True).assign(target="a", src="a")
    return Result("causal.ablation_curves", table, "accuracy", meta={"relations": ["a"], "removed": {"a": 2}})


def test_link_resamples_prompts_and_orders():
    rng = np.random.default_rng(0)
    base, own = np.ones(40), (rng.random(40) < 0.3).astype(float)
    random = (rng.random((5, 40)) < np.array([0.9, 0.5, 0.8, 0.7, 0.6])[:, None]).astype(float)
    found = link(curves_of(own, random, base)).table.set_index("metric")
    assert found.loc["without its heads", "value"] == own.mean()
    assert found.loc["difference", "value"] == pytest.approx(random.mean() - own.mean())
    # By hand: prompts are drawn once for both terms, orders on their own.
    drawn = []
    for _ in range(4000):
        prompts, orders = rng.integers(40, size=40), rng.integers(5, size=5)
        drawn.append(random[orders][:, prompts].mean() - own[prompts].mean())
    expected = np.quantile(drawn, [0.025, 0.975])
    # 1,000 resamples place a quantile to within about 0.01.
    np.testing.assert_allclose(found.loc["difference", ["value_low", "value_high"]].astype(float), expected, atol=0.03)
    few = link(curves_of(own, random[:, :1].repeat(40, 1), base)).table.set_index("metric")
    spread = few.loc["without random heads", "value_high"] - few.loc["without random heads", "value_low"]
    assert spread > 0.3  # orders that differ in all prompts
    single = link(curves_of(own, random[1:2], base)).table.set_index("metric")
    spread = single.loc["without random heads", "value_high"] - single.loc["without random heads", "value_low"]
    assert 0.25 < spread < 0.37  # 40 prompts of which half are right: 2 x 1.96 x 0.5 / sqrt(40) = 0.31
    equal = link(curves_of(own, own[None], base)).table.set_index("metric")
    # The same prompts are drawn for both.
    np.testing.assert_allclose(equal.loc["difference", ["value_low", "value_high"]].astype(float), 0.0, atol=1e-12)


def test_link_without_random_orders_or_of_another_method(planted):
    empty = link(curves_of(np.zeros(4), [], np.ones(4))).table.set_index("metric")
    assert empty.loc["difference", ["value", "value_low"]].isna().all() and empty.loc["all heads", "value"] == 1.0
    with pytest.raises(ValueError, match="maps.relation_scores"):
        link(planted[2])


def test_refusals_say_what_to_write(planted):
    model, relations, scores = planted
    with pytest.raises(ValueError, match="at least 1"):
        ablation_curves(model, relations, scores, counts=[0])
    with pytest.raises(ValueError, match="no relation 'first'"):
        ablation_curves(model, relations, scores.filter(target="second"))
    bare = Relations((Relation.from_pairs(model, "first", [("w4", "w14")]),))
    with pytest.raises(ValueError, match="prompts="):
        ablation_curves(model, bare, scores)
    with pytest.raises(ValueError, match="in it once"):
        ablation_curves(model, bare, scores, prompts={"first": "w2"})
    assert (
        means(ablation_curves(model, bare, scores, prompts={"first": "w2 {source}"}))["first", "first", OWN, 0] == 1.0
    )


def test_the_shipped_prompts(smol_raw):
    from interp.tasks import relations as shipped

    made = shipped(smol_raw, ["country_capital", "past_tense", "copying"], min_pairs=1, max_pairs=2)
    assert [causal._template(relation, {}) for relation in made] == [
        "The capital of {source} is",
        "For example: weave -> wove, strive -> strove, rescue -> rescued, {source} ->",
        "For example: lantern -> lantern, meadow -> meadow, whistle -> whistle, {source} ->",
    ]
