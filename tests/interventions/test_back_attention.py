from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.interventions import back_attention
from interp.interventions.back_attention import Attached, BackAttention, effect
from interp.models import Model, load, toy
from interp.models.program import program
from interp.tasks import Task

ARCHITECTURES = ("gpt2", "llama", "gpt_neox", "mistral")


@pytest.fixture(scope="module")
def llama() -> Model:
    return toy.random("llama")


def awake(model: Model, *, source: int = 1, target: int = 2, **sizes: int) -> BackAttention:
    """A module whose output is not zero."""
    back = BackAttention(model.d_model, source=source, target=target, **{"d_inner": 8, "n_heads": 2} | sizes)
    with torch.no_grad():
        back.o.copy_(torch.randn(back.o.shape, generator=torch.Generator().manual_seed(1)))
    return back


def by_hand(back: BackAttention, low: Tensor, high: Tensor, seen: list[int]) -> Tensor:
    """B of one prompt, one head and one query at a time, `[pos d_model]`; positions not in `seen` are padding."""
    size = back.d_inner // back.n_heads

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt()

    out = torch.zeros_like(low)
    for q in range(len(low)):
        keys = [k for k in range(q + 1) if k in seen] or [q]
        for head in range(back.n_heads):
            part = slice(head * size, (head + 1) * size)
            query = unit(low[q]) @ back.q[:, part]
            scores = [float(query @ (unit(high[k]) @ back.k[:, part])) / math.sqrt(size) for k in keys]
            total = sum(math.exp(score) for score in scores)
            for k, score in zip(keys, scores, strict=True):
                out[q] += math.exp(score) / total * (unit(high[k]) @ back.v[:, part]) @ back.o[part]
    return out


# --- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_first_nothing_changes(architecture: str) -> None:
    model = toy.random(architecture)
    tokens = toy.random_tokens(model, 2, 6)
    for source, target in ((0, 0), (0, 2), (2, 2)):
        attached = Attached(model, BackAttention(model.d_model, source=source, target=target))
        assert torch.equal(attached(tokens), model(tokens))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source, target", [(0, 0), (0, 2), (1, 2), (2, 2)])
def test_layer_by_layer_by_hand_gives_the_same_logits(architecture: str, source: int, target: int) -> None:
    model = toy.random(architecture, weights="raw")
    tokens = toy.random_tokens(model, 2, 6)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    back = awake(model, source=source, target=target)
    steps = program(model)
    with torch.no_grad():
        frame = steps.frame(tokens, mask)
        streams = [steps.embed(tokens, mask)]  # the stream before each layer, and after the last
        for layer in range(model.n_layers):
            streams.append(steps.layer(layer, streams[-1], frame)["resid_post"])
        low, high = streams[source], streams[target + 1]
        seen = [list(range(6)), list(range(2, 6))]
        stream = low + torch.stack([by_hand(back, low[i], high[i], seen[i]) for i in range(2)])
        for layer in range(source, model.n_layers):
            stream = steps.layer(layer, stream, frame)["resid_post"]
        expected = steps.logits(stream)
        measured = Attached(model, back)(tokens, mask)
        plain = model(tokens, mask)
    real = mask.bool()
    # float32 sums in another order, on logits of size 1 to 10
    torch.testing.assert_close(measured[real], expected[real], rtol=0, atol=2e-4)
    assert float((measured - plain)[real].abs().max()) > 0.1, "and it does change something"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_position_sees_a_later_one(architecture: str) -> None:
    model = toy.random(architecture)
    attached = Attached(model, awake(model, source=0))
    tokens = toy.random_tokens(model, 1, 7)
    with torch.no_grad():
        whole = attached(tokens)
        for pos in range(7):
            other = tokens.clone()
            other[0, pos] = 2 + (tokens[0, pos] + 1) % 60
            changed = (attached(other) - whole).abs().amax(-1)[0]
            assert float(changed[:pos].sum()) == 0.0
            assert float(changed[pos]) > 1e-3


def test_padding_changes_nothing(llama: Model) -> None:
    attached = Attached(llama, awake(llama, source=0))
    tokens = toy.random_tokens(llama, 1, 5)
    padded = torch.cat([torch.full((1, 3), 9), tokens], 1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    with torch.no_grad():
        # float32 sums over more keys, some of them of weight zero
        torch.testing.assert_close(attached(padded, mask)[:, 3:], attached(tokens), rtol=0, atol=1e-4)
        assert float((attached(padded)[:, 3:] - attached(tokens)).abs().max()) > 1e-2


def test_bfloat16_gives_what_float32_gives_nearly(llama: Model) -> None:
    rounded = load(toy.random_module("llama"), tokenizer=toy.tokenizer(), dtype="bfloat16")
    tokens = toy.random_tokens(llama, 2, 6)
    with torch.no_grad():
        logits = Attached(rounded, awake(llama, source=0))(tokens)
        assert logits.dtype == torch.bfloat16
        exact = Attached(llama, awake(llama, source=0))(tokens)
    # 8 bits over three layers: logits here have a spread of about 10
    assert float((logits.float() - exact).abs().mean()) < 0.05 * float(exact.std())


# --- gradients -----------------------------------------------------------------------------------------------------


def test_gradients_are_finite_differences_and_only_of_its_own_weights() -> None:
    model = load(toy.random_module("llama"), tokenizer=toy.tokenizer(), dtype="float64", weights="raw")
    tokens = toy.random_tokens(model, 2, 5)
    back = awake(model, source=1).double()
    attached = Attached(model, back)
    needed = [weight.requires_grad for weight in model.bridge.parameters()]

    def loss() -> Tensor:
        return attached(tokens)[:, -1].log_softmax(-1)[:, 7].sum()

    loss().backward()
    assert all(weight.grad is None for weight in model.bridge.parameters())
    assert [weight.requires_grad for weight in model.bridge.parameters()] == needed, "as they were"
    assert {name for name, _ in attached.named_parameters()} == {"back.q", "back.k", "back.v", "back.o"}
    generator = torch.Generator().manual_seed(0)
    for weight in back.parameters():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        step = 1e-3
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * step)
                values.append(float(loss()))
                weight.sub_(direction, alpha=sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        assert weight.grad is not None
        # The model's own norms and softmax are in float32 whatever its weights: 1e-6 of rounding over a step of 1e-3.
        assert float((weight.grad * direction).sum()) == pytest.approx(slope, abs=2e-3)
        assert abs(slope) > 0.1


# --- effect --------------------------------------------------------------------------------------------------------


def made_task(model: Model) -> Task:
    return Task.from_pairs(
        model, "own", ["w2 w3 w4", "w5 w6"], ["w7 w3 w4", "w8 w6"], [" w9", " w10"], [" w11", " w12"]
    )  # fmt: skip


def test_effect_is_what_the_two_models_say_one_prompt_at_a_time(llama: Model) -> None:
    back, task = awake(llama, source=0), made_task(llama)
    result = effect(llama, back, task, batch_size=1)
    whole = effect(llama, back, task)
    table = result.table.sort_values(["prompt", "metric"], ignore_index=True)
    for column in ("value_before", "value_after", "value"):
        np.testing.assert_allclose(  # padding or not: float32 sums in another order
            table[column], whole.table.sort_values(["prompt", "metric"])[column], atol=1e-4
        )
    for row, prompt in enumerate(task.prompts):
        tokens = llama.tokenize(prompt).ids
        with torch.no_grad():
            for column, run in (("value_before", llama), ("value_after", Attached(llama, back))):
                logits = run(tokens)[0, -1].double()
                right, wrong = int(task.answers[row]), int(task.wrong[row])
                expected = {
                    "accuracy": float(logits.argmax() == right),
                    "log-probability": float(logits.log_softmax(0)[right]),
                    "logit difference": float(logits[right] - logits[wrong]),
                }
                found = table[table["prompt"] == row].set_index("metric")[column].to_dict()
                assert found == pytest.approx(expected, abs=1e-4)  # as above
    assert result.meta["n_parameters"] == 4 * 32 * 8
    assert result.meta["source"] == 0 and result.meta["target"] == 2
    assert 0 < result.meta["share_of_model"] < 1


# --- kept and read again -------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(llama: Model, tmp_path: Path) -> None:
    back = awake(llama, source=0, target=1, d_inner=6, n_heads=3)
    place = back_attention.save(back, llama, tmp_path / "kept")
    again = back_attention.load(llama, place)
    assert (again.source, again.target, again.n_heads) == (0, 1, 3)
    tokens = toy.random_tokens(llama, 2, 6)
    with torch.no_grad():
        assert torch.equal(Attached(llama, again)(tokens), Attached(llama, back)(tokens))
    rounded = awake(llama).to(torch.bfloat16)
    kept = back_attention.load(llama, back_attention.save(rounded, llama, tmp_path / "kept"))
    assert torch.equal(kept.o, rounded.o) and kept.o.dtype == torch.bfloat16


def test_another_model_is_refused(llama: Model, tmp_path: Path) -> None:
    place = back_attention.save(awake(llama), llama, tmp_path)
    for other in (toy.random("llama", seed=1), toy.random("llama", weights="raw")):
        with pytest.raises(ValueError, match="was trained on .* not on .*train it anew"):
            back_attention.load(other, place)
    with pytest.raises(FileNotFoundError, match="holds no back attention"):
        back_attention.load(llama, tmp_path / "elsewhere")


def test_broken_files_are_refused(llama: Model, tmp_path: Path) -> None:
    place = back_attention.save(awake(llama), llama, tmp_path)
    weights, about = place / "back_attention.safetensors", place / "back_attention.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        back_attention.load(llama, place)
    weights.write_bytes(whole)
    save_file({k: v for k, v in load_file(weights).items() if k != "o"}, weights)
    with pytest.raises(ValueError, match=r"has no o of \(8, 32\)"):
        back_attention.load(llama, place)
    about.write_text(json.dumps({"model": "x"}))
    with pytest.raises(ValueError, match="cannot be read"):
        back_attention.load(llama, place)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_refusals(llama: Model) -> None:
    for source, target in ((2, 1), (-1, 1)):
        with pytest.raises(ValueError, match=f"source={source}, target={target}: a lower layer reads from a higher"):
            BackAttention(32, source=source, target=target)
    with pytest.raises(ValueError, match="d_inner=8 cannot be divided among n_heads=3"):
        BackAttention(32, source=0, target=1, d_inner=8, n_heads=3)
    with pytest.raises(ValueError, match="target=3, but .* has layers 0 to 2"):
        Attached(llama, BackAttention(32, source=0, target=3))
    with pytest.raises(ValueError, match="d_model=16, but .* has 32"):
        Attached(llama, BackAttention(16, source=0, target=1))
    task = made_task(llama)
    plain = Task("plain", task.prompts, task.clean, "own", mask=task.mask)
    with pytest.raises(ValueError, match="'plain' has no answers"):
        effect(llama, awake(llama), plain)
