"""Dynamic scores: brute force, the published two passes, one layer in closed form; and their correlation."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.core.rerun import trace
from interp.models import load, toy
from interp.models.hooks import run
from interp.models.program import hook_name, program
from interp.tasks import Relation, Relations
from interp.tasks import relations as shipped
from interp.weights import _values, dynamic
from interp.weights._values import prompts_of, read
from interp.weights.dynamic import MEAN, POOLED, WITH, WITHOUT, correlation, dynamic_scores, rescored
from interp.weights.maps import relation_scores

LISTS = {
    "copying": [(i, i) for i in range(2, 14)],
    "next": [(i, i + 1) for i in range(4, 20)],
    "many": [(i, 3 * j + 2) for i in range(4, 7) for j in range(4)],
}
TEMPLATES = ["w5 {source} w6 w5", "w7 w6 {source}"]


def rank_of(scores, target):
    return int((scores >= scores[target]).sum()) - 1, int((scores <= scores[target]).sum()) - 1


def brute_ranks(model, relations, templates):
    """`[metric src pair template layer head]`, a prompt, a head and a whole row of the vocabulary at a time."""
    steps = program(model)
    eye = torch.eye(model.d_model)
    pairs = [pair for relation in relations for pair in relation.pairs]
    found = np.zeros((2, 2, len(pairs), len(templates), model.n_layers, model.n_heads), dtype=int)
    with torch.no_grad():
        w_u = (steps.unembed(eye) - steps.unembed(torch.zeros(1, model.d_model))).double()
        for i, pair in enumerate(pairs):
            for j, template in enumerate(templates):
                words = template.replace("{source}", pair.source).split()
                tokens = torch.tensor([[int(word[1:]) for word in words]])
                at = template.split().index("{source}")
                seen = trace(steps, tokens, None, {(s, layer) for s in ("z", "v") for layer in range(model.n_layers)})
                for layer in range(model.n_layers):
                    for head in range(model.n_heads):
                        group = head * model.n_key_value_heads // model.n_heads
                        vectors = seen["z", layer][0, -1, head], seen["v", layer][0, at, group]
                        for src, vector in enumerate(vectors):
                            row = vector.double() @ steps.w_o(layer)[head].double() @ w_u
                            found[:, src, i, j, layer, head] = rank_of(row, pair.target_token)
    return found


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_equals_brute_force(architecture, toys, pairs):
    model = toys(architecture, weights="raw")
    relations = pairs(model, **LISTS)
    result = dynamic_scores(model, relations, templates=TEMPLATES)
    expected = brute_ranks(model, relations, TEMPLATES)
    ours = np.stack([result.arrays[name][1] for name in ("rank", "rank_suppressed")])
    # Hooks pad prompts and the program does not: entries differ in their last bits, and two of a row rarely swap.
    assert np.abs(ours - expected).max() <= 1
    assert (ours == expected).mean() > 0.999
    own = result.filter(target="next", component=TEMPLATES[1], src=WITHOUT, metric="suppresses", layer=2, head=1).table
    which = result.arrays["relation"][1] == 1
    assert own["value"].item() == pytest.approx((ours[1, 1, which, 1, 2, 1] < 10).mean())
    assert result.meta["k"] == {"copying": 1, "next": 10, "many": 10}
    assert len(result.table) == 3 * 2 * 2 * 2 * 12 and result.table["value"].nunique() > 5


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "gemma"])
def test_one_pass_is_the_published_two(architecture, toys):
    """Every pattern set to the source, every z to its clean value: what heads mix before that is the value."""
    model = toys(architecture, weights="raw")
    texts = ["w5 w9 w6 w5", "w5 w12 w6 w5", "w5 w3 w6 w5"]
    tokens, at = model.tokenize(texts).ids, 1
    names = [hook_name("z", layer) for layer in range(model.n_layers)]
    clean = run(model, tokens, capture=names).cache
    seen = {}

    def one_hot(pattern, hook):
        pattern = pattern.clone()
        pattern[:, :, -1] = 0.0
        pattern[:, :, -1, at] = 1.0
        return pattern

    def hold(name):
        def back(z, hook):
            seen[name] = z[:, -1].clone()
            return clean[name]

        return back

    hooks = [(hook_name("pattern", layer), one_hot) for layer in range(model.n_layers)]
    run(model, tokens, hooks=[*hooks, *((name, hold(name)) for name in names)])
    z, v = read(model, texts, np.full(3, at), range(model.n_layers))
    per_group = model.n_heads // model.n_key_value_heads
    for layer, name in enumerate(names):
        # The same products summed with zeros between: rounding of float32 numbers of size 1.
        torch.testing.assert_close(v[layer].repeat_interleave(per_group, 1), seen[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(z[layer], clean[name][:, -1], rtol=1e-5, atol=1e-5)
        assert (z[layer] - seen[name]).abs().max() > 0.01


def unit_gains(architecture):
    module = toy.random_module(architecture)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    return load(module, tokenizer=toy.tokenizer(), weights="raw")


def test_without_context_the_first_layer_is_the_static_score(pairs):
    """RMS norm with gain 1 only scales a row, there is no position in a value, and no layer before."""
    model = unit_gains("llama")
    relations = pairs(model, **LISTS)
    ours = dynamic_scores(model, relations, templates=TEMPLATES, layers=[0])
    static = relation_scores(model, relations, layers=[0])
    for j in range(2):
        for name in ("rank", "rank_suppressed"):
            np.testing.assert_array_equal(ours.arrays[name][1][1, :, j], static.arrays[name][1])
            assert (ours.arrays[name][1][0, :, j] != static.arrays[name][1]).any()
    r = correlation(static, ours).filter(src=WITHOUT).table
    np.testing.assert_allclose(r["value"].dropna(), 1.0, atol=1e-12)  # equal numbers
    assert r["value"].notna().sum() > 10


def test_the_source_is_found_by_its_place(toys, smol_raw):
    model = toys("llama", weights="raw")
    relation = Relation.from_pairs(model, "copying", [("w5", "w5"), ("w6", "w6")])
    prompts = prompts_of(model, relation.pairs, ["w5 w6 {source} w6 w5", "{source} w5"])
    assert prompts.texts == ["w5 w6 w5 w6 w5", "w5 w5", "w5 w6 w6 w6 w5", "w6 w5"]
    assert prompts.position.tolist() == [2, 0, 2, 0] and prompts.index.tolist() == [[0, 1], [2, 3]]
    # The default model's templates, with a source that one of them has, and one of several tokens.
    relations = shipped(smol_raw, ["country_capital"], min_pairs=1, max_pairs=3)
    own = Relation.from_pairs(smol_raw, "own", [("story", "tale"), ("Turkmenistan", "Asia")])
    prompts = prompts_of(smol_raw, [*own.pairs, *own.multi_token], relations.templates)
    for text, position in zip(prompts.texts, prompts.position, strict=True):
        tokens = smol_raw.to_str_tokens(smol_raw.tokenize(text).ids[0])
        before = "".join(tokens[: position + 1])
        assert before.endswith((" story", " Turkmenistan")) and before.count("story") <= 2
    last = [text.endswith("contains") for text in prompts.texts]
    assert prompts.position[last].tolist()[0] == 3  # The story of story


def test_special_tokens_before_the_prompt_count(toys):
    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(toy.tokenizer())
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    model = load(toy.random_module("llama"), tokenizer=with_bos, weights="raw")
    relation = Relation.from_pairs(model, "copying", [("w5", "w5")])
    assert prompts_of(model, relation.pairs, ["w6 {source}"]).position.tolist() == [2]


def test_sources_of_several_tokens(toys):
    model = toys("llama", weights="raw")
    relations = Relations((
        Relation.from_pairs(model, "some", [("w8", "w9"), ("w2 w3", "w4"), ("w6 w5 w4", "w3")]),
        Relation.from_pairs(model, "none", [("w8", "w9")]),
    ))  # fmt: skip
    result = dynamic_scores(model, relations, templates=["w7 {source} w9"], multi_token=True)
    assert (result.meta["relations"], result.meta["left_out"]) == (["some"], ["none"])
    steps = program(model)
    for i, (tokens, target) in enumerate([([7, 2, 3, 9], 4), ([7, 6, 5, 4, 9], 3)]):
        seen = trace(steps, torch.tensor([tokens]), None, {("v", 1)})
        with torch.no_grad():
            row = seen["v", 1][0, -2, 1] @ steps.w_o(1)[3] @ model.bridge.unembed.W_U
        assert result.arrays["rank"][1][1, i, 0, 1, 3] == rank_of(row, target)[0]
    static = relation_scores(model, Relations((relations["some"],)), k=10)
    assert set(correlation(static, rescored(result, k=10)).table["target"]) == {"some"}
    with pytest.raises(ValueError, match="no pairs whose source is several tokens"):
        dynamic_scores(model, Relations((relations["none"],)), templates=["w7 {source}"], multi_token=True)


def test_grouped_values_written_out_for_every_head_score_the_same(toys, pairs):
    import transformers

    small = toy.random_module("llama")
    config = copy.deepcopy(small.config)
    config.num_key_value_heads = 4
    full = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    state = small.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    models = [load(m, tokenizer=toy.tokenizer(), weights="raw") for m in (small, full.eval())]
    ours, theirs = (dynamic_scores(m, pairs(m, **LISTS), templates=TEMPLATES).arrays["rank"][1] for m in models)
    # Another matrix product for the values: last bits, which swap two entries of a row at times.
    assert (ours == theirs).mean() > 0.999


def test_batches_and_shared_prompts_change_nothing(toys, pairs, monkeypatch):
    model = toys("gpt2", weights="raw")
    relations = pairs(model, **LISTS)
    whole = dynamic_scores(model, relations, templates=TEMPLATES)
    assert whole.meta["n_prompts"] == 2 * 18  # sources 2 to 19, of 40 pairs
    monkeypatch.setattr(_values, "_FORWARD", 3)
    small = dynamic_scores(model, relations, templates=TEMPLATES, batch_size=5)
    np.testing.assert_array_equal(small.arrays["rank"][1], whole.arrays["rank"][1])
    alone = dynamic_scores(model, Relations((relations["next"],)), templates=TEMPLATES[1:], layers=[2])
    which = whole.arrays["relation"][1] == 1
    np.testing.assert_array_equal(alone.arrays["rank"][1][:, :, 0, 0], whole.arrays["rank"][1][:, which, 1, 2])


def test_k_without_recomputation_and_resumed(toys, pairs, monkeypatch):
    model = toys("llama", weights="raw")
    relations = pairs(model, **LISTS)
    options = {"templates": TEMPLATES, "batch_size": 10}
    whole = dynamic_scores(model, relations, **options)
    at_5 = dynamic_scores(model, relations, k=5, **options)
    np.testing.assert_array_equal(rescored(whole, k=5).table["value"], at_5.table["value"])
    assert (rescored(whole, k=64).table["value"] == 1).all()
    calls, compute = [], dynamic.read

    def stops(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(dynamic, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        dynamic_scores(model, relations, **options)
    resumed = dynamic_scores(model, relations, **options)
    assert len(calls) == 5  # 36 prompts in four batches: two, the stopped one, and two more
    np.testing.assert_array_equal(resumed.arrays["rank"][1], whole.arrays["rank"][1])


def test_refusals_say_what_to_write(toys, pairs):
    model = toys("llama", weights="raw")
    relations = pairs(model, **LISTS)
    processed = toys("llama")
    with pytest.raises(ValueError, match='weights="raw"'):
        dynamic_scores(processed, pairs(processed, **LISTS), templates=TEMPLATES)
    for templates, message in (
        (None, "no templates"), (["w2"], "in it once"), (["{source} "], "no space at its end"), (TEMPLATES * 2, "twice")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dynamic_scores(model, relations, templates=templates)


# --- correlation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(toys, pairs):
    model = toys("llama", weights="raw")
    relations = pairs(model, **LISTS)
    return relation_scores(model, relations), dynamic_scores(model, relations, templates=TEMPLATES)


def test_correlation_is_pearsons(scored):
    static, dyn = scored
    found = correlation(static, dyn)
    assert len(found.table) == 3 * 2 * 2 * 4
    one = {"target": "next", "metric": "suppresses"}
    x = static.filter(**one).table.sort_values(["layer", "head"])["value"].to_numpy()
    for src in (WITH, WITHOUT):
        ys = [
            dyn.filter(**one, src=src, component=template).table.sort_values(["layer", "head"])["value"].to_numpy()
            for template in TEMPLATES
        ]
        rows = found.filter(**one, src=src).table.set_index("component")
        expected = {POOLED: (np.tile(x, 2), np.concatenate(ys)), MEAN: (x, np.mean(ys, 0))}
        expected |= {template: (x, y) for template, y in zip(TEMPLATES, ys, strict=True)}
        for component, (a, b) in expected.items():
            assert rows.loc[component, "value"] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-10)
            assert rows.loc[component, "value_low"] < rows.loc[component, "value"] < rows.loc[component, "value_high"]
        assert (rows["value_max"] == x.max()).all() and (rows["value_heads"] == 12).all()


def test_the_bootstrap_resamples_heads_with_all_their_templates():
    rng = np.random.default_rng(0)
    x, y = rng.random(9), rng.random((9, 3))
    drawn = rng.integers(9, size=(5, 9))
    weights = np.stack([np.bincount(row, minlength=9) for row in drawn]).astype(float)
    expected = [np.corrcoef(np.repeat(x[row], 3), y[row].ravel())[0, 1] for row in drawn]
    np.testing.assert_allclose(dynamic._pearson(x, y, weights), expected, rtol=1e-10)


def test_the_interval_covers_a_known_correlation():
    """Of 60 studies with r = 0.6 over 200 heads, about 95% of the intervals hold it."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        x = rng.standard_normal(200)
        y = 0.6 * x + 0.8 * rng.standard_normal(200)
        weights = rng.multinomial(200, np.full(200, 1 / 200), size=300).astype(float)
        low, high = np.quantile(dynamic._pearson(x, y[:, None], weights), [0.025, 0.975])
        covered += low < 0.6 < high
    assert covered >= 52  # of 57 expected; fewer has probability below 1%


def test_where_a_score_is_constant_r_is_nan_and_says_why(scored):
    static, dyn = scored
    flat = replace(static, table=static.table.assign(value=0.0))
    found = correlation(flat, dyn)
    assert found.table["value"].isna().all() and found.table["value_low"].isna().all()
    assert {each["why"] for each in found.meta["undefined"]} == {"the static score is the same for all heads"}
    flat = replace(dyn, table=dyn.table.assign(value=0.5))
    assert "dynamic" in correlation(static, flat).meta["undefined"][0]["why"]


def test_correlation_refuses_scores_that_do_not_belong_together(scored, toys, pairs):
    static, dyn = scored
    other = relation_scores(toys("qwen2", weights="raw"), pairs(toys("qwen2", weights="raw"), **LISTS))
    with pytest.raises(ValueError, match="two models"):
        correlation(other, dyn)
    with pytest.raises(ValueError, match=r"k=10 and at k=3"):
        correlation(static, rescored(dyn, k={"copying": 1, "next": 3, "many": 10}))
    with pytest.raises(ValueError, match="no relation in common"):
        correlation(replace(static, meta={**static.meta, "relations": ["else"]}), dyn)
    # The heads of both count.
    few = dynamic_scores(toys("llama", weights="raw"), pairs(toys("llama", weights="raw"), **LISTS),
                         templates=TEMPLATES, layers=[1, 2])  # fmt: skip
    assert set(correlation(static, few).table["value_heads"]) == {8}


def test_bfloat16_gives_nearly_the_same(toys, pairs):
    model = toys("llama", weights="raw")
    rough = load(toy.random_module("llama"), tokenizer=toy.tokenizer(), weights="raw", dtype="bfloat16")
    one, other = (
        dynamic_scores(each, pairs(each, **LISTS), templates=TEMPLATES).arrays["rank"][1] for each in (model, rough)
    )
    # Weights and activations of 8 bits: a rank of 64 moves by a few places.
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98
