"""Is training what it says: AdamW by hand, the same bits each time, and no difference after a stop?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import interp
from interp.core.result import Result
from interp.dynamics import _run
from interp.dynamics.train import IGNORED, Trained, build, config, train
from interp.models import toy

SIZES = {"d_vocab": 12, "n_ctx": 12, "n_layers": 1, "n_heads": 2, "d_model": 16}
SHORT: dict[str, Any] = {"steps": 12, "every": 4, "warmup": 3, "batch_size": 8, "learning_rate": 1e-2}


def first_token(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Five tokens; after the last one comes the first again."""
    tokens = torch.randint(2, 12, (n, 5), generator=generator)
    return tokens, torch.cat([torch.full((n, 4), IGNORED), tokens[:, :1]], dim=1)


def llama() -> Any:
    return config("llama", **SIZES)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def column(history: Result, metric: str) -> np.ndarray:
    return history.filter(metric=metric).table["value"].to_numpy()


@pytest.fixture(scope="module")
def whole() -> Trained:
    """A run that nothing stopped."""
    return train(llama(), first_token, **SHORT)


class Stopped(Exception):
    """Stands for a kill."""


def stops_at(step: int, draw: Callable = first_token) -> Callable:
    """The same prompts, and a kill when those of a step are asked for."""
    # Two draws come before the first step: the held-out prompts, and the first batch for the data's fingerprint.
    calls = iter(range(-2, 10_000))

    def draws(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        if next(calls) == step:
            raise Stopped
        return draw(generator, n)

    return draws


# --- the update ----------------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Logits of the next token by the current one: a matrix, and a bias for the rule that vectors do not decay."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(12, 12, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(12, generator=generator, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens] + self.bias


def by_hand(module: Bigram, batches: list[tuple[Tensor, Tensor]], rates: list[float], decay: float) -> list[float]:
    """AdamW as its paper writes it, with the gradient of softmax written out; the losses on the way."""
    names, losses = ("table", "bias"), []
    first, second = ({name: torch.zeros_like(getattr(module, name)) for name in names} for _ in range(2))
    for step, ((tokens, targets), rate) in enumerate(zip(batches, rates, strict=True), 1):
        gradient = {name: torch.zeros_like(getattr(module, name)) for name in names}
        total, n = 0.0, 0
        for token, target in zip(tokens.flatten().tolist(), targets.flatten().tolist(), strict=True):
            if target == IGNORED:
                continue
            logits = module.table.data[token] + module.bias.data
            chances = logits.exp() / logits.exp().sum()
            total, n = total - math.log(chances[target]), n + 1
            wrong = chances.clone()
            wrong[target] -= 1
            gradient["table"][token] += wrong
            gradient["bias"] += wrong
        losses.append(total / n)
        norm = math.sqrt(sum(float((gradient[name] / n).square().sum()) for name in names))
        for name in names:
            # PyTorch's clipping divides by the norm + 1e-6.
            g = gradient[name] / n * min(1.0, 1.0 / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.98 * second[name] + 0.02 * g * g
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.98**step)
            weight = getattr(module, name).data
            weight *= 1 - rate * (decay if name == "table" else 0.0)
            weight -= rate * mean / (square.sqrt() + 1e-8)
    return losses


@pytest.mark.parametrize("scale", [1.0, 30.0])  # the second is clipped: its gradient's norm is above 1
def test_updates_are_adamw_written_out(scale: float) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def pairs(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 3, (n, 4), generator=generator)
        targets = tokens * 3
        targets[:, 1] = IGNORED
        seen.append((tokens, targets))
        return tokens, targets

    trained, plain = Bigram(), Bigram()
    with torch.no_grad():
        trained.table *= scale
        plain.table *= scale
    _, history = train(
        trained, pairs, steps=7, warmup=3, learning_rate=0.05, weight_decay=0.3, batch_size=4, dtype=torch.float64
    )
    rates = [0.05 / 3, 0.1 / 3, 0.05]
    rates += [0.05 * (0.1 + 0.9 * (1 + math.cos(math.pi * done / 4)) / 2) for done in range(4)]
    rates[2:4] = [0.05, 0.05]  # the peak is reached by the last step of the warm-up, and the cosine starts from it
    losses = by_hand(plain, seen[2:], rates, 0.3)
    # float64: seven updates of numbers of order 1 to 30, each good to 1e-15 of it
    torch.testing.assert_close(weights(trained), weights(plain), rtol=0, atol=1e-11)
    np.testing.assert_allclose(column(history, "loss"), losses, rtol=1e-11)
    assert (weights(trained) - weights(Bigram())).abs().max() > 0.1


def test_loss_of_a_task_goes_to_its_entropy() -> None:
    # After token t comes one of t..t+3 with odds 1:2:3:4, whatever else: no model can do better than this entropy.
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def noisy(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 8, (n, 4), generator=generator)
        return tokens, tokens + torch.multinomial(shares, 4 * n, True, generator=generator).view(n, 4)

    history = train(llama(), noisy, steps=120, warmup=10, learning_rate=1e-2, every=120).history
    entropy = -float((shares * shares.log()).sum())
    # 4,096 held-out targets: the standard error of their mean loss is 0.008, and of the accuracy 0.008
    assert column(history, "held-out loss")[-1] == pytest.approx(entropy, abs=0.04)
    assert column(history, "held-out accuracy")[-1] == pytest.approx(0.4, abs=0.04)
    assert column(history, "held-out loss")[0] > entropy + 0.5


def test_measurements_are_those_of_the_module_on_the_prompts() -> None:
    held_out = first_token(torch.Generator().manual_seed(5), 21)  # not a multiple of the batch size
    sizes = config("gpt2", **SIZES, resid_pdrop=0.5)  # nothing is dropped while measuring
    module, history = train(sizes, first_token, held_out=held_out, **SHORT)
    with torch.no_grad():
        logits = module(held_out[0]).logits[:, -1]
    answers = held_out[1][:, -1]
    # float32, summed in another order
    assert column(history, "held-out loss")[-1] == pytest.approx(float(F.cross_entropy(logits, answers)), rel=1e-5)
    assert column(history, "held-out accuracy")[-1] == float((logits.argmax(-1) == answers).double().mean())
    start = build(sizes).eval()
    with torch.no_grad():
        at_start = F.cross_entropy(start(held_out[0]).logits[:, -1], answers)
    assert column(history, "held-out loss")[0] == pytest.approx(float(at_start), rel=1e-5)
    table = history.table
    assert table[table["metric"] == "loss"]["step"].tolist() == list(range(1, 13))
    assert table[table["metric"] == "held-out loss"]["step"].tolist() == [0, 4, 8, 12]
    assert set(table["metric"]) == set(history.meta["units"]) == set(_run.UNITS)
    assert list(table.columns) == ["step", "metric", "value"]


def test_positions_without_target_count_for_nothing(whole: Trained) -> None:
    def more(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        tokens, targets = first_token(generator, n)
        longer = torch.cat([tokens, torch.randint(2, 12, (n, 1), generator=generator)], dim=1)
        return longer, torch.cat([targets, torch.full((n, 1), IGNORED)], dim=1)

    other = train(llama(), more, **SHORT)
    # A token after the last target changes nothing before it but the order of float32 sums.
    torch.testing.assert_close(weights(whole.module), weights(other.module), rtol=0, atol=1e-4)


# --- the same each time --------------------------------------------------------------------------------------------


def test_one_seed_gives_one_model_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(11)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy())
    first = train(llama(), first_token, seed=3, **SHORT)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(12)  # must not matter
    second = train(llama(), first_token, seed=3, **SHORT)
    assert torch.equal(weights(first.module), weights(second.module))
    assert first.history.table.equals(second.history.table)
    third = train(llama(), first_token, seed=4, **SHORT)
    assert not torch.equal(weights(first.module), weights(third.module))


def test_steps_and_held_out_prompts_are_all_different() -> None:
    drawn: list[Tensor] = []

    def noted(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        prompts = first_token(generator, n)
        drawn.append(prompts[0][:8])
        return prompts

    train(llama(), noted, **SHORT)
    held_out, fingerprinted, *steps = drawn
    assert torch.equal(fingerprinted, steps[0])
    assert len(steps) == 12
    assert len({tuple(tokens.flatten().tolist()) for tokens in [held_out, *steps]}) == 13


@pytest.mark.parametrize("stop, architecture", [(1, "llama"), (5, "llama"), (11, "llama"), (9, "gpt2 with dropout")])
def test_a_stopped_run_ends_like_another(architecture: str, stop: int, whole: Trained, tmp_path: Path) -> None:
    sizes = llama()
    if architecture != "llama":  # its embedding is tied, and it draws random numbers in training
        sizes = config("gpt2", **SIZES, resid_pdrop=0.2, attn_pdrop=0.2)
        whole = train(sizes, first_token, **SHORT)
    with pytest.raises(Stopped):
        train(sizes, stops_at(stop), folder=tmp_path, **SHORT)
    assert (tmp_path / "checkpoint.safetensors").is_file() == (stop >= 4)
    asked: list[int] = []

    def noted(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        asked.append(n)
        return first_token(generator, n)

    torch.manual_seed(stop)  # the state of the process that goes on must not matter
    resumed = train(sizes, noted, folder=tmp_path, **SHORT)
    assert len(asked) - 2 == 12 - stop // 4 * 4  # it did go on from the checkpoint
    assert torch.equal(weights(resumed.module), weights(whole.module))
    assert resumed.history.table.equals(whole.history.table)
    assert resumed.history.meta == whole.history.meta
    assert not resumed.module.training


def test_a_finished_run_is_read_and_not_repeated(whole: Trained, tmp_path: Path) -> None:
    train(llama(), first_token, folder=tmp_path, **SHORT)
    again = train(llama(), stops_at(0), folder=tmp_path, **SHORT)
    assert torch.equal(weights(again.module), weights(whole.module))
    assert again.history.table.equals(whole.history.table)


def test_a_kill_while_writing_leaves_the_old_checkpoint(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = _run.save_file, iter(range(10))

    def half(tensors: Any, file: Path, metadata: Any) -> None:
        real(tensors, file, metadata)
        if next(calls) == 1:
            file.write_bytes(file.read_bytes()[:1000])
            raise Stopped

    monkeypatch.setattr(_run, "save_file", half)
    with pytest.raises(Stopped):
        train(llama(), first_token, folder=tmp_path, **SHORT)
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as stored:
        assert stored.metadata()["step"] == "4"
    resumed = train(llama(), first_token, folder=tmp_path, **SHORT)
    assert torch.equal(weights(resumed.module), weights(whole.module))


def test_early_stop_is_at_the_first_measurement_that_reaches_the_target(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 60, "learning_rate": 1e-2, "warmup": 10, "every": 10}
    _, full = train(llama(), first_token, **settings)
    accuracy = column(full, "held-out accuracy")
    target = float(accuracy[3])
    assert max(accuracy[:3]) < target
    stopped = train(llama(), first_token, stop_at=target, folder=tmp_path, **settings)
    assert np.array_equal(column(stopped.history, "held-out accuracy"), accuracy[:4])
    assert stopped.history.meta["steps_done"] == 30 == len(column(stopped.history, "loss"))
    again = train(llama(), stops_at(0), stop_at=target, folder=tmp_path, **settings)
    assert torch.equal(weights(again.module), weights(stopped.module))
    # A model that is there already needs no step.
    assert train(stopped.module, first_token, stop_at=target, steps=5).history.meta["steps_done"] == 0


# --- what is trained -----------------------------------------------------------------------------------------------


def test_only_what_needs_a_gradient_is_trained_and_stored(tmp_path: Path) -> None:
    module = build(llama())
    for name, weight in module.named_parameters():
        weight.requires_grad_("lm_head" in name)
    before = copy.deepcopy(module.state_dict())
    trained, history = train(module, first_token, folder=tmp_path, **SHORT)
    assert trained is module
    changed = {name for name, weight in module.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"lm_head.weight"}
    assert history.meta["n_trained"] == 12 * 16 < history.meta["n_parameters"]
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as stored:
        assert {name for name in stored.keys() if name.startswith("weight ")} == {"weight lm_head.weight"}  # noqa: SIM118
    fresh = build(llama())
    for name, weight in fresh.named_parameters():
        weight.requires_grad_("lm_head" in name)
    resumed, _ = train(fresh, stops_at(0), folder=tmp_path, **SHORT)
    assert torch.equal(weights(resumed), weights(trained))


def test_trained_modules_take_hooks() -> None:
    for architecture in ("llama", "gpt2"):
        module, _ = train(config(architecture, **SIZES), first_token, **SHORT)
        model = interp.load(module, tokenizer=toy.tokenizer(12), weights="raw")
        assert (model.n_layers, model.n_heads, model.d_model, model.d_vocab, model.n_ctx) == (1, 2, 16, 12, 12)
        tokens, _ = first_token(torch.Generator().manual_seed(0), 4)
        with torch.no_grad():
            # fused attention in training, eager with hooks: float32 sums in another order
            torch.testing.assert_close(model(tokens), module(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_that_of_weights_and_optimiser(dtype: torch.dtype, tmp_path: Path) -> None:
    module, history = train(llama(), first_token, dtype=dtype, folder=tmp_path, **SHORT)
    assert {weight.dtype for weight in module.parameters()} == {dtype}
    assert history.meta["dtype"] == str(dtype)[6:]
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as stored:
        assert stored.get_tensor("optimiser 0 exp_avg").dtype == dtype
    again, _ = train(llama(), stops_at(0), dtype=dtype, folder=tmp_path, **SHORT)
    assert torch.equal(weights(again), weights(module))


def test_weights_start_at_the_scale_of_the_stream() -> None:
    module = build(config("llama", d_vocab=500, n_ctx=8, d_model=64), seed=1)
    spread = module.model.layers[0].self_attn.q_proj.weight.detach().std()
    # 4,096 draws: the standard error of their spread is 1.1%
    assert float(spread) == pytest.approx(1 / 8, rel=0.05)
    assert not torch.equal(weights(module), weights(build(config("llama", d_vocab=500, n_ctx=8), seed=2)))


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(llama(), first_token, folder=tmp_path, **SHORT)

    def other_data(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        tokens, targets = first_token(generator, n)
        return tokens, targets.roll(1, dims=0)

    with pytest.raises(ValueError, match="with learning_rate=0.01, not 0.02"):
        train(llama(), first_token, folder=tmp_path, **SHORT | {"learning_rate": 0.02})
    with pytest.raises(ValueError, match="with data="):
        train(llama(), other_data, folder=tmp_path, **SHORT)
    with pytest.raises(ValueError, match="with start="):
        train(build(llama(), seed=1), first_token, folder=tmp_path, **SHORT)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="cannot be read .* delete it"):
        train(llama(), first_token, folder=tmp_path, **SHORT)


def test_a_folder_that_cannot_be_written_costs_the_checkpoint_only(whole: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be written .* folder with free space"):
        module, _ = train(llama(), first_token, folder=tmp_path / "file", **SHORT)
    assert torch.equal(weights(module), weights(whole.module))


def test_divergence_is_named_with_its_step() -> None:
    calls = iter(range(-2, 100))
    module = build(llama())

    def breaks(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        if next(calls) == 6:
            with torch.no_grad():
                module.lm_head.weight.fill_(float("nan"))
        return first_token(generator, n)

    with pytest.raises(FloatingPointError, match="loss is nan at step 7 of 12: train with a learning_rate below 0.01"):
        train(module, breaks, **SHORT)


def returns(tokens: Tensor, targets: Tensor) -> Callable:
    return lambda generator, n: (tokens[:n], targets[:n])


IDS = torch.full((1024, 5), 3)


@pytest.mark.parametrize(
    "draw, message",
    [
        (returns(IDS, IDS[:, :4]), r"must be \[1024 pos\]"),
        (returns(IDS[:, 0], IDS[:, 0]), r"must be \[1024 pos\]"),
        (returns(IDS[:9], IDS[:9]), r"must be \[1024 pos\]"),
        (returns(IDS.int(), IDS), r"add .long\(\)"),
        (returns(IDS + 9, IDS), "tokens run from 12 to 12, but the vocabulary has ids 0 to 11"),
        (returns(IDS, IDS - 4), "targets run from -1 to -1"),
        (returns(IDS, torch.full_like(IDS, IGNORED)), "no target"),
        (returns(IDS.repeat(1, 3), IDS.repeat(1, 3)), "prompts of 15 tokens, but the context is 12: raise n_ctx"),
    ],
)
def test_bad_prompts_are_refused(draw: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(llama(), draw, **SHORT)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        train(llama(), first_token, **SHORT | {"steps": 0})
    with pytest.raises(ValueError, match="requires_grad"):
        train(build(llama()).requires_grad_(False), first_token, **SHORT)
    with pytest.raises(ValueError, match="d_model=16 cannot be divided among n_heads=3"):
        config(**SIZES | {"n_heads": 3})
    with pytest.raises(ValueError, match='use "llama" or "gpt2"'):
        config("bert", **SIZES)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='use device="cpu"'):
            train(llama(), first_token, device="cuda", **SHORT)
