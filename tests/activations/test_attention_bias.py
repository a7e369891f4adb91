"""Is the trained decoder a GPT-2, is its attention bias the paper's, and does a stopped run end like another?"""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from interp.activations import attention_bias
from interp.activations._small_gpt import Seen
from interp.activations.attention_bias import (
    ARMS,
    UNITS,
    SmallGPT,
    attention_pattern,
    attention_with_bias,
    bias_share,
    train_arms,
)
from interp.core.registry import methods
from interp.core.result import Result
from interp.tasks.task import Task

SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "context": 12}
SMALL = {**SHAPE, "steps": 20, "batch": 4, "evaluations": 4, "progress": False}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(seed: int = 0) -> list[torch.Tensor]:
    """q, k, v of two sequences, three heads, seven tokens, five dimensions, then k' and v'."""
    return [*draw(3, 2, 3, 7, 5, seed=seed).unbind(), *draw(2, 3, 5, seed=seed + 1).unbind()]


def text(n: int = 2000, seed: int = 0) -> torch.Tensor:
    """Ids with something to learn: each of ten symbols is followed by the next but one, seven times in ten."""
    generator = torch.Generator().manual_seed(seed)
    jumps = torch.where(torch.rand(n, generator=generator) < 0.7, 2, torch.randint(0, 10, (n,), generator=generator))
    return jumps.cumsum(0) % 10 * 1000  # ids far apart: they must be renumbered


def small(arm: str, seed: int = 0) -> SmallGPT:
    """A decoder in float64 with weights large enough for its parts to matter."""
    model = SmallGPT(arm, d_vocab=11, seed=seed, **SHAPE).double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def ids(batch: int = 3, pos: int = 12) -> torch.Tensor:
    return torch.randint(0, 11, (batch, pos), generator=torch.Generator().manual_seed(4))


def test_bias_mixes_plain_attention_with_a_constant() -> None:
    q, k, v, k_bias, v_bias = heads()
    share = bias_share(q, k, k_bias)[..., None]
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixed = share * v_bias[None, :, None] + (1 - share) * plain
    # float64: a few rounding errors of 2e-16 on numbers of order 1
    torch.testing.assert_close(attention_with_bias(q, k, v, k_bias, v_bias), mixed, rtol=0, atol=5e-15)
    assert share.min() > 0.01 and share.max() < 0.99 and (mixed - plain).abs().max() > 0.1


def test_bias_equals_the_formula_written_out() -> None:
    q, k, v, k_bias, v_bias = heads(seed=3)
    out, share, pattern = (
        attention_with_bias(q, k, v, k_bias, v_bias),
        bias_share(q, k, k_bias),
        attention_pattern(q, k),
    )
    for b, h, t in itertools.product(range(2), range(3), range(7)):
        scores = torch.stack([q[b, h, t] @ key for key in [k_bias[h], *k[b, h, : t + 1]]]) / 5**0.5
        weights = scores.exp() / scores.exp().sum()
        expected = weights @ torch.stack([v_bias[h], *v[b, h, : t + 1]])
        torch.testing.assert_close(out[b, h, t], expected, rtol=0, atol=5e-15)
        torch.testing.assert_close(share[b, h, t], weights[0], rtol=0, atol=5e-15)
        torch.testing.assert_close(pattern[b, h, t, : t + 1], weights[1:] / weights[1:].sum(), rtol=0, atol=5e-15)
        assert pattern[b, h, t, t + 1 :].abs().sum() == 0


def test_gradients_of_the_bias_match_finite_differences() -> None:
    inputs = [tensor.requires_grad_() for tensor in heads()]
    assert torch.autograd.gradcheck(attention_with_bias, inputs)
    assert torch.autograd.gradcheck(bias_share, (inputs[0], inputs[1], inputs[3]))


@pytest.mark.parametrize("arm", ARMS)
def test_gradients_of_every_arm_match_finite_differences(arm: str) -> None:
    model = small(arm)
    loss = F.cross_entropy(model(ids()[:, :-1]).flatten(0, 1), ids()[:, 1:].flatten())
    loss.backward()
    named = dict(model.named_parameters())
    for name in [
        "blocks.0.qkv.weight",
        {"sink": "sink", "attn_bias": "blocks.1.k_bias"}.get(arm, "token_embedding.weight"),
    ]:
        parameter, step = named[name], 1e-6
        index = int(parameter.grad.abs().argmax())
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.flatten()[index] += sign * step
                sides.append(F.cross_entropy(model(ids()[:, :-1]).flatten(0, 1), ids()[:, 1:].flatten()).item())
                parameter.flatten()[index] -= sign * step
        # central difference: error of step^2 and of rounding / step, both below 1e-9 here
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(parameter.grad.flatten()[index].item(), abs=1e-7)
        assert parameter.grad.abs().max() > 1e-5


def test_default_arm_equals_hugging_faces_gpt2() -> None:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=12, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager"
    )
    theirs, ours = transformers.GPT2LMHeadModel(config).eval().double(), small("default")
    pairs = {
        "wte": ours.token_embedding, "wpe": ours.position_embedding, "ln_f": ours.ln_final,
        **{f"h.{i}.{name}": getattr(block, own) for i, block in enumerate(ours.blocks) for name, own in (
            ("ln_1", "ln_1"), ("ln_2", "ln_2"), ("attn.c_attn", "qkv"), ("attn.c_proj", "attn_out"),
            ("mlp.c_fc", "mlp_in"), ("mlp.c_proj", "mlp_out"),
        )},
    }  # fmt: skip
    with torch.no_grad():
        for name, own in pairs.items():
            module = theirs.transformer.get_submodule(name)
            module.weight.copy_(own.weight.T if isinstance(own, torch.nn.Linear) else own.weight)
            if getattr(own, "bias", None) is not None:
                module.bias.copy_(own.bias)
    expected = theirs(ids(), output_hidden_states=True, output_attentions=True)
    seen: list[Seen] = []
    # float64 rounding through two blocks
    torch.testing.assert_close(ours(ids(), seen), expected.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[0].resid_post, expected.hidden_states[1], rtol=0, atol=1e-12)
    for block, attention in zip(seen, expected.attentions, strict=True):
        torch.testing.assert_close(block.pattern, attention, rtol=0, atol=1e-12)
    assert expected.logits.std() > 0.1


def test_a_bias_that_is_never_looked_at_changes_nothing() -> None:
    default, biased = small("default"), small("attn_bias")
    biased.load_state_dict(default.state_dict(), strict=False)
    with torch.no_grad():
        for block, plain in zip(biased.blocks, default.blocks, strict=True):
            for layer in (block, plain):  # dimension 0 of every query is 1, so k' decides the score alone
                layer.qkv.weight[[0, 8]], layer.qkv.bias[[0, 8]] = 0, 1
            block.k_bias.zero_()
            block.k_bias[:, 0] = -1e5
            block.v_bias.zero_()
    torch.testing.assert_close(biased(ids()), default(ids()), rtol=0, atol=1e-12)
    with torch.no_grad():
        biased.blocks[0].k_bias[:, 0] = 0  # seen again, even a zero value dilutes the others
    assert (biased(ids()) - default(ids())).abs().max() > 1e-3


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_sees_the_future(arm: str) -> None:
    model, changed = small(arm), ids()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    one, other = model(ids()), model(changed)
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=0, atol=1e-12)
    assert (one[:, 7:] - other[:, 7:]).abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("arm", ARMS)
def test_attention_seen_is_the_attention_used(arm: str) -> None:
    model, seen = small(arm), []
    model(ids(), seen)
    positions, columns = {"default": (12, 12), "sink": (13, 13), "attn_bias": (12, 13)}[arm]
    for block in seen:
        assert block.resid_post.shape == (3, positions, 16) and block.pattern.shape == (3, 2, positions, columns)
        torch.testing.assert_close(block.pattern.sum(-1), torch.ones(3, 2, positions).double(), rtol=0, atol=1e-14)
        assert (block.pattern[..., 0] > 0).all()  # the sink, k' and token 0 are always visible
    if arm == "attn_bias":  # k' far along the queries of a head takes all of its attention
        with torch.no_grad():
            model.blocks[1].qkv.weight[0], model.blocks[1].qkv.bias[0] = 0, 1
            model.blocks[1].k_bias[0, 0] = 1e3
        seen.clear()
        model(ids(), seen)
        assert seen[1].pattern[:, 0, :, 0].min() > 0.999


def test_arms_start_from_the_same_weights() -> None:
    state = torch.random.get_rng_state()
    models = {arm: dict(SmallGPT(arm, d_vocab=11, seed=5, **SHAPE).named_parameters()) for arm in ARMS}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, models[arm][name]) for name, p in models["default"].items() for arm in ARMS)
    own = {arm: {n for n in models[arm] if n not in models["default"]} for arm in ARMS}
    assert own["default"] == set() and own["sink"] == {"sink"}
    assert own["attn_bias"] == {f"blocks.{i}.{x}_bias" for i in (0, 1) for x in "kv"}
    other = dict(SmallGPT("default", d_vocab=11, seed=6, **SHAPE).named_parameters())
    assert not torch.equal(other["blocks.0.qkv.weight"], models["default"]["blocks.0.qkv.weight"])
    # 0.02 for what reads and 0.02 / sqrt(2 x 2 layers) for what writes; 768 and 1024 draws are within 10%
    assert models["default"]["blocks.0.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert models["default"]["blocks.0.mlp_out.weight"].std().item() == pytest.approx(0.01, rel=0.1)


def test_measures_of_a_planted_block() -> None:
    resid = torch.ones(4, 5, 8)
    resid[0, 0, 3] = -5000  # massive, at position 0
    resid[1, 2, 3] = 5000  # massive, elsewhere
    resid[2] *= 0.01
    resid[2, 0, 3] = 90  # 9000 times the median, but not above 100
    resid[3] *= 6
    resid[3, 0, 3] = 5000  # above 100, but only 833 times the median
    pattern = torch.zeros(4, 2, 5, 6)
    pattern[..., 0], pattern[..., 1] = 0.25, 0.5
    pattern[:, :, 0, :] = 9.0  # the first query must not count
    seen = attention_bias._measure("attn_bias", Seen(resid, pattern))
    assert seen["massive entries"].tolist() == [1, 1, 0, 0]
    assert seen["largest |h| at position 0"].tolist() == [1, 0, 1, 1]
    assert seen["largest |h|"][[0, 1, 3]].tolist() == [5000, 5000, 5000] and seen["median |h|"].tolist()[3] == 6
    assert seen["largest/median"][3].item() == pytest.approx(5000 / 6)
    assert (
        seen["attention mass on k'"].tolist() == [0.25] * 4 and seen["attention mass on token 0"].tolist() == [0.5] * 4
    )
    assert attention_bias._measure("default", Seen(resid, pattern))["attention mass on token 0"].tolist() == [0.25] * 4
    pattern[:, :, 1, :] = 9.0  # behind a sink the first token is query 1
    sink = attention_bias._measure("sink", Seen(resid, pattern))
    assert sink["attention mass on the sink"].tolist() == [0.25] * 4
    assert sink["attention mass on token 0"].tolist() == [0.5] * 4


def test_training_learns_and_reports_by_arm_and_seed(tmp_path: Path) -> None:
    options = {**SMALL, "steps": 120, "batch": 16, "learning_rate": 5e-3}
    result = train_arms(text(), seeds=(0, 1), checkpoint=tmp_path, **options)
    table = result.table
    assert set(table["component"]) == set(ARMS) and set(table["target"]) == {"seed 0", "seed 1"}
    assert sorted(set(table["step"])) == [0, 30, 60, 90, 120]
    assert set(table["metric"]) == set(UNITS) == set(result.meta["units"])
    losses = result.filter(metric="validation loss").table.pivot(
        index="step", columns=["component", "target"], values="value"
    )
    # The source's entropy: .73 x log(1/.73) + 9 x .03 x log(1/.03) = 1.18 nats. At the start log(10) = 2.30.
    assert losses.loc[0].between(2.2, 2.4).all()
    assert losses.loc[120].between(1.1, 1.6).all()
    per_layer = table[table["metric"] != "validation loss"]
    assert set(per_layer["layer"]) == {0, 1} and table[table["metric"] == "validation loss"]["layer"].isna().all()
    only = {"attention mass on k'": "attn_bias", "attention mass on the sink": "sink"}
    for metric, arm in only.items():
        rows = table[table["metric"] == metric]
        assert set(rows["component"]) == {arm} and rows["value"].between(0.001, 0.999).all()
    ends = table[table["step"] == 120]
    ratio = ends[ends["metric"] == "largest/median"]["value"]
    assert (ratio > 1).all() and (ends[ends["metric"] == "median |h|"]["value"] > 0).all()
    assert result.meta["d_vocab"] == 10 and result.meta["n_symbols"] == 2000
    again = Result.load(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(again.table, table)


def test_attention_at_the_start_is_spread_evenly() -> None:
    table = train_arms(text(), **{**SMALL, "steps": 1, "evaluations": 1}).filter(step=0).table
    mass = table.groupby(["component", "metric"])["value"].mean()
    even = sum(1 / n for n in range(2, 13)) / 11
    one_more = sum(1 / n for n in range(3, 14)) / 11  # with the sink or k' there is one more to look at
    # Weights of size 0.02 make scores of about 1e-3: even to a few in a thousand.
    assert mass["default", "attention mass on token 0"] == pytest.approx(even, rel=0.01)
    for arm, own in (("sink", "attention mass on the sink"), ("attn_bias", "attention mass on k'")):
        assert mass[arm, own] == pytest.approx(one_more, rel=0.01)
        assert mass[arm, "attention mass on token 0"] == pytest.approx(one_more, rel=0.01)


@pytest.mark.parametrize("arm", ARMS)
def test_a_stopped_run_ends_like_an_uninterrupted_one(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_arms(text(), arms=[arm], seeds=(3,), checkpoint=tmp_path / "whole", **SMALL)
    schedule, asked = attention_bias._learning_rate, []

    def stop_at_13(step: int, steps: int, peak: float) -> float:
        if step == 13:
            raise KeyboardInterrupt
        return schedule(step, steps, peak)

    monkeypatch.setattr(attention_bias, "_learning_rate", stop_at_13)
    with pytest.raises(KeyboardInterrupt):
        train_arms(text(), arms=[arm], seeds=(3,), checkpoint=tmp_path / "cut", **SMALL)

    def count(step: int, steps: int, peak: float) -> float:
        asked.append(step)
        return schedule(step, steps, peak)

    monkeypatch.setattr(attention_bias, "_learning_rate", count)
    resumed = train_arms(text(), arms=[arm], seeds=(3,), checkpoint=tmp_path / "cut", **SMALL)
    assert min(asked) == 10  # from the last evaluation on, not from the start
    pd.testing.assert_frame_equal(resumed.table, whole.table, check_exact=True)
    assert resumed.meta == whole.meta
    ends = [load_file(tmp_path / folder / f"{arm}-seed3.safetensors") for folder in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 60
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    asked.clear()
    finished = train_arms(text(), arms=[arm], seeds=(3,), checkpoint=tmp_path / "cut", **SMALL)
    assert not asked and finished.table.equals(whole.table)


def test_without_a_checkpoint_folder_the_cache_resumes_and_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    whole = train_arms(text(), arms=["default"], **SMALL)
    assert not list(tmp_path.rglob("*.safetensors"))
    schedule = attention_bias._learning_rate

    def stop_at_17(step: int, steps: int, peak: float) -> float:
        if step == 17:
            raise KeyboardInterrupt
        return schedule(step, steps, peak)

    monkeypatch.setattr(attention_bias, "_learning_rate", stop_at_17)
    with pytest.raises(KeyboardInterrupt):
        train_arms(text(), arms=["default"], **SMALL)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    monkeypatch.setattr(attention_bias, "_learning_rate", schedule)
    assert train_arms(text(), arms=["default"], **SMALL).table.equals(whole.table)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_kill_while_storing_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_arms(text(), arms=["default"], checkpoint=tmp_path / "whole", **SMALL)
    store, calls = attention_bias.save_file, []

    def half_a_file(tensors: dict, file: Path, metadata: dict) -> None:
        calls.append(file)
        if len(calls) == 3:
            file.write_bytes(b"half a fi")
            raise KeyboardInterrupt
        store(tensors, file, metadata)

    monkeypatch.setattr(attention_bias, "save_file", half_a_file)
    with pytest.raises(KeyboardInterrupt):
        train_arms(text(), arms=["default"], checkpoint=tmp_path / "cut", **SMALL)
    resumed = train_arms(text(), arms=["default"], checkpoint=tmp_path / "cut", **SMALL)
    assert resumed.table.equals(whole.table)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    train_arms(text(), arms=["default"], checkpoint=tmp_path, **SMALL)
    file = tmp_path / "default-seed0.safetensors"
    with pytest.raises(ValueError, match=r"default-seed0.safetensors was trained with batch=4, not 5"):
        train_arms(text(), arms=["default"], checkpoint=tmp_path, **{**SMALL, "batch": 5})
    with pytest.raises(ValueError, match="was trained with text="):
        train_arms(text(seed=1), arms=["default"], checkpoint=tmp_path, **SMALL)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read.*delete it to start again"):
        train_arms(text(), arms=["default"], checkpoint=tmp_path, **SMALL)


def test_a_folder_that_cannot_be_written_costs_only_the_resuming(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="cannot be written.*training goes on"):
        result = train_arms(text(), arms=["default"], checkpoint=tmp_path / "file" / "folder", **SMALL)
    assert result.table["step"].max() == 20


def test_same_seed_same_numbers_and_another_seed_others() -> None:
    one = train_arms(text(), arms=["attn_bias"], seeds=(0, 1), **SMALL)
    state = torch.random.get_rng_state()
    again = train_arms(text(), arms=["attn_bias"], seeds=(1,), **SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    second = one.filter(target="seed 1").table
    pd.testing.assert_frame_equal(again.table, second, check_exact=True)
    assert not (one.filter(target="seed 0").table["value"].to_numpy() == second["value"].to_numpy()).all()


def test_a_task_is_read_as_the_bytes_of_its_prompts() -> None:
    prompts = tuple(f"prompt {i}: it is a début, and {'x' * (i % 3)} more" for i in range(30))
    task = Task("text", prompts, torch.zeros(30, 2, dtype=torch.long), "made here")
    result = train_arms(task, arms=["default"], **SMALL)
    raw = "\n".join(prompts).encode()
    assert (result.meta["d_vocab"], result.meta["n_symbols"]) == (len(set(raw)), len(raw))
    assert result.meta["vocabulary"] == "UTF-8 bytes of the prompts"
    assert result.meta["task_fingerprint"] == task.fingerprint
    as_ids = train_arms(torch.tensor(list(raw)), arms=["default"], **SMALL)
    assert as_ids.table.equals(result.table) and as_ids.meta["task_fingerprint"] is None


def test_held_out_text_is_not_trained_on() -> None:
    numbers = torch.arange(1000)
    train, windows = attention_bias._split(numbers, 12)
    assert train.tolist() == list(range(900)) and windows.min() == 900
    assert windows.shape == (100 // 13, 13) and len(windows.unique()) == windows.numel()
    assert attention_bias._split(torch.arange(100_000), 12)[1].shape == (32, 13)


def test_every_step_reads_other_windows_and_every_arm_the_same() -> None:
    settings = {**SHAPE, "d_vocab": 10_000, "steps": 6, "batch": 4, "learning_rate": 1e-3, "evaluations": 1}
    windows: dict[str, list[list[int]]] = {}
    for arm in ARMS:
        run = attention_bias._Run(arm, 0, settings, Path("not there"), "cpu", torch.float32)
        for run.step in range(6):
            batch = run._batch(torch.arange(10_000))
            assert batch.shape == (4, 13) and (batch.diff(dim=1) == 1).all()
            windows.setdefault(arm, []).append(batch[:, 0].tolist())
    assert windows["default"] == windows["sink"] == windows["attn_bias"]
    assert len(set(sum(windows["default"], []))) == 24


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    rates = [attention_bias._learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == rates[100] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-4) and rates[100:] == sorted(rates[100:], reverse=True)


def test_divergence_is_said_where() -> None:
    with pytest.raises(FloatingPointError, match=r"arm 'default', seed 0: the loss is \w+ after step 5 of 20"):
        train_arms(text(), arms=["default"], **{**SMALL, "learning_rate": 1e30})


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (text(), {"arms": ["defualt"]}, "arm 'defualt' is not known; use default, sink, attn_bias"),
        (text(), {"n_heads": 3}, "d_model=16 cannot be divided among n_heads=3"),
        (text().reshape(20, 100), {}, r"token ids \[n_tokens\], but got torch.int64 of shape \[20, 100\]: flatten"),
        (text().float(), {}, "got torch.float32"),
        (text(200), {}, "has 200 symbols, but context=12 needs 260"),
        (text(), {"evaluations": 30}, "steps=20, evaluations=30"),
    ],
)
def test_what_cannot_be_trained_is_refused(tokens: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_arms(tokens, **{**SMALL, **options})


def test_method_is_registered() -> None:
    info = {m.path: m for m in methods()}["activations.attention_bias.train_arms"]
    assert (info.paper, info.notebook) == ("arXiv:2402.17762", "massive_activations") and "FLOPs" in info.cost
