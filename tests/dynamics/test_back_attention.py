from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.dynamics.back_attention import Small, examples, train_back_attention
from interp.dynamics.composition import function_composition
from interp.dynamics.train import IGNORED, config, train
from interp.interventions.back_attention import Attached, BackAttention, effect, load, save
from interp.models import Model, toy
from interp.tasks import Task

SIZES: dict[str, Any] = {"d_vocab": 64, "n_ctx": 12, "n_layers": 2, "n_heads": 2, "d_model": 16}
SHORT: dict[str, Any] = {"steps": 12, "every": 4, "warmup": 3, "batch_size": 8, "learning_rate": 1e-2}


class Stopped(Exception):
    """Stands for a kill."""


def small(architecture: str = "llama", *, awake: bool = True, **options: Any) -> Small:
    made = Small(config(architecture, **SIZES), **{"d_inner": 8, "n_heads": 2} | options)
    if awake:
        with torch.no_grad():
            made.back.o.copy_(torch.randn(made.back.o.shape, generator=torch.Generator().manual_seed(1)))
    return made.eval()


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trained"


@pytest.fixture(scope="module")
def model() -> Model:
    return toy.random("llama")


def questions(model: Model, first: int, n: int) -> Task:
    """Prompts of one or two tokens whose answer is the token before the last, plus one."""
    clean = [f"w{first + i} w{first + i + 1}" if i % 2 else f"w{first + i}" for i in range(n)]
    answers = [f" w{first + i + 1}" for i in range(n)]
    corrupt = [" ".join(f"w{int(word[1:]) + 1}" for word in prompt.split()) for prompt in clean]
    return Task.from_pairs(model, "next", clean, corrupt, answers, [" w2"] * n)


# --- inside small transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("source, target", [(0, 0), (0, 1), (1, 1)])
def test_it_is_the_same_as_back_attention_by_hooks(architecture: str, source: int, target: int) -> None:
    made = small(architecture, source=source, target=target)
    loaded = interp.load(made.base, tokenizer=toy.tokenizer(), weights="raw")
    tokens = toy.random_tokens(loaded, 3, 6)
    with torch.no_grad():
        # fused attention here, eager with hooks: float32 sums in another order
        torch.testing.assert_close(made(tokens), Attached(loaded, made.back)(tokens), rtol=0, atol=1e-4)
        assert float((made(tokens) - made.base(tokens).logits).abs().max()) > 0.1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_at_first_it_is_the_transformer_alone(architecture: str) -> None:
    made = small(architecture, awake=False)
    tokens = torch.randint(2, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(made(tokens), made.base(tokens).logits)


def test_no_position_sees_a_later_one() -> None:
    made = small(target=1)
    tokens = torch.randint(2, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = made(tokens)
        for pos in range(6):
            other = tokens.clone()
            other[0, pos] += 1
            changed = (made(other) - whole).abs().amax(-1)[0]
            assert float(changed[:pos].sum()) == 0.0 and float(changed[pos]) > 1e-4


def test_gradients_go_through_both_passes() -> None:
    made = small(source=1, target=1).double()
    tokens = torch.randint(2, 60, (2, 5), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return made(tokens)[:, -1].log_softmax(-1)[:, 7].sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name in (
        "back.q",
        "back.o",
        "base.model.layers.0.self_attn.v_proj.weight",
        "base.model.layers.1.mlp.up_proj.weight",
    ):
        weight = made.get_parameter(name)
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * 1e-3)
                values.append(float(loss()))
                weight.sub_(direction, alpha=sign * 1e-3)
        slope = (values[0] - values[1]) / 2e-3
        # The norms are in float32 whatever the weights: 1e-6 of rounding over a step of 1e-3.
        assert float((weight.grad * direction).sum()) == pytest.approx(slope, abs=5e-3)
        assert abs(slope) > 0.05


def stops_at(step: int, draw: Callable) -> Callable:
    calls = iter(range(-2, 10_000))  # see tests/dynamics/test_train.py

    def draws(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        if next(calls) == step:
            raise Stopped
        return draw(generator, n)

    return draws


def test_a_stopped_run_ends_like_another(tmp_path: Path) -> None:
    made = function_composition(8, 4)
    options = SHORT | {"held_out": made.held_out}
    whole = train(small(awake=False), made.batch, **options)
    with pytest.raises(Stopped):
        train(small(awake=False), stops_at(6, made.batch), folder=tmp_path, **options)
    resumed = train(small(awake=False), made.batch, folder=tmp_path, **options)
    assert torch.equal(weights(resumed.module), weights(whole.module))
    assert resumed.history.table.equals(whole.history.table)
    # All of it learns, and the module's own weights are counted.
    meta = whole.history.meta
    assert meta["n_trained"] == meta["n_parameters"] == sum(w.numel() for w in small().base.parameters()) + 4 * 16 * 8
    with pytest.raises(ValueError, match="with start="):  # other layers are another module
        train(small(awake=False, target=1), made.batch, folder=tmp_path, **options)


def test_bad_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="target=2, but the transformer has layers 0 to 1"):
        small(target=2)
    with pytest.raises(ValueError, match="source=1, target=0: a lower layer"):
        small(source=1, target=0)


# --- on a frozen model ---------------------------------------------------------------------------------------------


def test_examples_are_the_prompts_without_their_padding(model: Model) -> None:
    task = questions(model, 5, 4)
    tokens, targets = examples(task)
    for i, prompt in enumerate(task.prompts):
        ids = model.tokenize(prompt).ids[0].tolist()
        assert tokens[i, : len(ids)].tolist() == ids
        assert targets[i].tolist() == [
            int(task.answers[i]) if place == len(ids) - 1 else IGNORED for place in range(tokens.shape[1])
        ]
    back = BackAttention(model.d_model, source=0, target=2)
    with torch.no_grad():
        back.o.fill_(0.1)
        attached = Attached(model, back)
        at_end = attached(tokens)[targets != IGNORED]
        # padding on the other side: float32 sums in another order
        torch.testing.assert_close(at_end, attached(task.clean, task.mask)[:, -1], rtol=0, atol=1e-4)


def test_only_back_attention_is_trained_and_it_learns(model: Model, tmp_path: Path) -> None:
    task, held_out = questions(model, 5, 24), questions(model, 30, 8)
    before = weights(model.bridge).clone()
    options: dict[str, Any] = {
        "steps": 60, "every": 20, "warmup": 5, "batch_size": 16, "learning_rate": 2e-2, "source": 1, "target": 2,
        "held_out": held_out, "d_inner": 8, "seed": 3,
    }  # fmt: skip
    back, history = train_back_attention(model, task, **options)
    assert torch.equal(weights(model.bridge), before)
    assert history.meta["n_trained"] == history.meta["n_parameters"] == 4 * 32 * 8
    losses = history.filter(metric="loss").table["value"].to_numpy()
    assert losses[-10:].mean() < 0.7 * losses[0]
    # What training measured is what the method measures, on the padded task.
    last = history.filter(metric="held-out loss").table["value"].iloc[-1]
    measured = effect(model, back, held_out).filter(metric="log-probability").table
    assert -measured["value_after"].mean() == pytest.approx(last, abs=1e-4)  # float32 sums in another order
    first = history.filter(metric="held-out loss").table["value"].iloc[0]
    assert -measured["value_before"].mean() == pytest.approx(first, abs=1e-4)
    again, same = train_back_attention(model, task, folder=tmp_path / "again", **options)
    assert torch.equal(weights(again), weights(back)) and same.table.equals(history.table)
    kept = load(model, save(back, model, tmp_path / "kept"))
    assert torch.equal(weights(kept), weights(back))
    assert effect(model, kept, held_out).table.equals(effect(model, back, held_out).table)


def test_a_finished_module_is_read_from_the_cache(model: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, held_out = questions(model, 5, 24), questions(model, 30, 8)
    options: dict[str, Any] = SHORT | {"source": 1, "target": 2, "held_out": held_out}
    back, history = train_back_attention(model, task, **options)
    train_back_attention(model, task, **options | {"seed": 1})
    train_back_attention(model, task[:23], **options)
    assert len(list(cache.iterdir())) == 3

    def no_step(*given: Any, **named: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(torch.optim.AdamW, "step", no_step)
    again, same = train_back_attention(model, task, **options)
    assert torch.equal(weights(again), weights(back)) and same.table.equals(history.table)


def test_a_checkpoint_goes_on_and_is_refused_on_another_model(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, held_out = questions(model, 5, 24), questions(model, 30, 8)
    options: dict[str, Any] = SHORT | {"source": 0, "target": 2, "held_out": held_out}
    whole, _ = train_back_attention(model, task, **options)
    real, calls = torch.randint, iter(range(-1, 100))  # the first draw is for the data's fingerprint

    def stops(*args: Any, **named: Any) -> Tensor:
        if next(calls) == 6:
            raise Stopped
        return real(*args, **named)

    monkeypatch.setattr(torch, "randint", stops)
    with pytest.raises(Stopped):
        train_back_attention(model, task, folder=tmp_path, **options)
    monkeypatch.undo()
    resumed, _ = train_back_attention(model, task, folder=tmp_path, **options)
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(ValueError, match="with start="):
        train_back_attention(toy.random("llama", seed=1), task, folder=tmp_path, **options)


def test_refusals(model: Model) -> None:
    task = questions(model, 5, 4)
    plain = Task("plain", task.prompts, task.clean, "own", mask=task.mask)
    for one, other in ((plain, task), (task, plain)):
        with pytest.raises(ValueError, match="'plain' has no answers"):
            train_back_attention(model, one, source=0, target=1, held_out=other, steps=1)
    with pytest.raises(ValueError, match="target=3, but .* has layers 0 to 2"):
        train_back_attention(model, task, source=0, target=3, held_out=task, steps=1)
