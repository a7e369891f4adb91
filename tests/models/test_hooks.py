"""Does every hook that is set fire, edit, see what it should, and go away again?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.models import HookNotFiredError, Model, load, nearest, run, toy

# The same numbers in another batch or beside padding: float32 sums in another order, logits of order 10.
SAME = {"rtol": 0.0, "atol": 3e-5}
MIDDLE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> Model:
    return toy.random("llama")


@pytest.fixture(scope="module")
def tokens(model: Model) -> Tensor:
    return toy.random_tokens(model, 3, 9)


def left_over(model: Model) -> int:
    """Hooks that are set on any point, by our account and by torch's."""
    points = model.bridge.hook_dict.values()
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in points)


def zero(activation: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(activation)


def test_a_run_without_hooks_is_the_model(model: Model, tokens: Tensor) -> None:
    done = run(model, tokens)
    assert torch.equal(done.logits, model(tokens))
    assert done.cache == {}
    assert not done.logits.requires_grad


def test_an_edit_reaches_the_output_and_only_during_the_run(model: Model, tokens: Tensor) -> None:
    before = model(tokens)
    edited = run(model, tokens, hooks=[(MIDDLE, zero)], capture=[MIDDLE, "blocks.2.hook_resid_pre"])
    assert edited.cache[MIDDLE].abs().max() == edited.cache["blocks.2.hook_resid_pre"].abs().max() == 0
    assert (edited.logits - before).abs().max() > 0.1
    assert torch.equal(model(tokens), before)
    assert left_over(model) == 0


def test_capture_sees_what_all_hooks_left_in_their_order(model: Model, tokens: Tensor) -> None:
    plain = run(model, tokens, capture=[MIDDLE]).cache[MIDDLE]
    seen: list[Tensor] = []

    def look(activation: Tensor, hook: Any) -> None:
        seen.append(activation.clone())

    hooks = [(MIDDLE, lambda a, hook: a + 1), (MIDDLE, look), (MIDDLE, lambda a, hook: 2 * a)]
    cache = run(model, tokens, hooks=hooks, capture=[MIDDLE, MIDDLE]).cache
    assert torch.equal(seen[0], plain + 1)
    assert torch.equal(cache[MIDDLE], 2 * (plain + 1))
    swapped = run(model, tokens, hooks=[hooks[2], hooks[0]], capture=[MIDDLE]).cache[MIDDLE]
    assert torch.equal(swapped, 2 * plain + 1)


def test_the_same_hook_twice_acts_twice(model: Model, tokens: Tensor) -> None:
    plain = run(model, tokens, capture=[MIDDLE]).cache[MIDDLE]
    plus = (MIDDLE, lambda a, hook: a + 1)
    assert torch.equal(run(model, tokens, hooks=[plus, plus], capture=[MIDDLE]).cache[MIDDLE], plain + 1 + 1)
    assert left_over(model) == 0


def test_the_hook_is_told_where_it_is(model: Model, tokens: Tensor) -> None:
    names: list[str] = []
    points = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    run(model, tokens, hooks=[(p, lambda a, hook: names.append(hook.name)) for p in points])
    assert [name.split(".")[1] for name in names] == ["0", "1", "2"]


def test_a_users_own_hooks_stay_and_count_first(tokens: Tensor) -> None:
    model = toy.random("llama")
    plain = run(model, tokens, capture=[MIDDLE]).cache[MIDDLE]
    model.hook_point(MIDDLE).add_hook(lambda a, hook: a + 3)
    cache = run(model, tokens, hooks=[(MIDDLE, lambda a, hook: 2 * a)], capture=[MIDDLE]).cache
    assert torch.equal(cache[MIDDLE], 2 * (plain + 3))
    assert len(model.hook_point(MIDDLE).fwd_hooks) == 1
    assert torch.equal(run(model, tokens, capture=[MIDDLE]).cache[MIDDLE], plain + 3)
    with pytest.raises(HookNotFiredError):
        run(model, tokens, capture=[MIDDLE, "blocks.0.attn.hook_result"])
    assert torch.equal(run(model, tokens, capture=[MIDDLE]).cache[MIDDLE], plain + 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(error: type[BaseException], model: Model, tokens: Tensor) -> None:
    def fail(activation: Tensor, hook: Any) -> None:
        raise error("in the hook")

    with pytest.raises(error, match="in the hook"):
        run(model, tokens, hooks=[("blocks.0.attn.hook_q", zero), (MIDDLE, fail)], capture=["blocks.0.hook_mlp_out"])
    assert left_over(model) == 0
    assert torch.is_grad_enabled()


# --- hooks that do nothing


def test_a_misspelt_hook_offers_the_nearest_and_sets_nothing(model: Model, tokens: Tensor) -> None:
    for options in (
        {"hooks": [(MIDDLE, zero), ("blocks.1.hook_resid_pots", zero)]},
        {"capture": ["blocks.1.hook_resid_pots"]},
    ):
        with pytest.raises(
            ValueError, match=r"has no hook 'blocks.1.hook_resid_pots'. Nearest: .*blocks.1.hook_resid_post"
        ):
            run(model, tokens, **options)
    with pytest.raises(ValueError, match=r"no hook 'blocks.3.attn.hook_z'. Nearest: blocks\..\.attn\.hook_z"):
        run(model, tokens, capture=["blocks.3.attn.hook_z"])  # there are layers 0 to 2
    with pytest.raises(ValueError, match="no hook '#'. Nearest: none. List them with"):
        run(model, tokens, capture=["#"])
    assert left_over(model) == 0


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "blocks.0.attn.hook_result"), ("gpt2", "blocks.2.hook_mlp_in"), ("gpt_neox", "hook_pos_embed")],
)
@pytest.mark.parametrize("as_capture", [True, False])
def test_a_hook_that_exists_but_does_not_fire(architecture: str, name: str, as_capture: bool) -> None:
    model = toy.random(architecture)
    assert name in model.bridge.hook_dict
    options: dict[str, Any] = {"capture": [MIDDLE, name]} if as_capture else {"hooks": [(MIDDLE, zero), (name, zero)]}
    with pytest.raises(HookNotFiredError, match=f"hook '{name}' exists on .* but did not fire .*set_use_attn_result"):
        run(model, toy.random_tokens(model, 2, 5), **options)
    assert left_over(model) == 0


def test_the_flag_that_the_message_names_makes_it_fire(tokens: Tensor) -> None:
    model = toy.random("llama")
    model.bridge.set_use_attn_result(True)
    result = run(model, tokens, capture=["blocks.0.attn.hook_result", "blocks.0.hook_attn_out"]).cache
    heads = result["blocks.0.attn.hook_result"]
    assert heads.shape == (3, 9, 4, 32)
    torch.testing.assert_close(heads.sum(2), result["blocks.0.hook_attn_out"], **SAME)


# --- stopping early, gradients


@pytest.mark.parametrize("layer", [0, 1, -1, -3])
def test_stopping_early_gives_the_same_activations_and_skips_the_rest(layer: int, tokens: Tensor) -> None:
    model = toy.random("gpt2")
    reached: list[str] = []
    for index in range(3):
        model.hook_point(f"blocks.{index}.attn.hook_z").add_hook(lambda a, hook: reached.append(hook.name))
    names = [f"blocks.{layer % 3}.hook_resid_post", "blocks.0.attn.hook_pattern"]
    whole = run(model, tokens, capture=names).cache
    reached.clear()
    stopped = run(model, tokens, capture=names, stop_after=layer)
    assert len(reached) == layer % 3 + 1
    assert stopped.output is None
    assert all(torch.equal(stopped.cache[name], whole[name]) for name in names)
    with pytest.raises(ValueError, match="stopped early .*leave stop_after out"):
        _ = stopped.logits
    edited = run(model, tokens, hooks=[(names[0], zero)], capture=names, stop_after=layer)
    assert edited.cache[names[0]].abs().max() == 0


def test_stopping_before_a_hook_is_an_error(model: Model, tokens: Tensor) -> None:
    with pytest.raises(HookNotFiredError, match=r"did not fire in this forward pass \(it stopped after layer 0\)"):
        run(model, tokens, capture=[MIDDLE], stop_after=0)
    with pytest.raises(ValueError, match="stop_after=3, but .* has layers 0 to 2"):
        run(model, tokens, stop_after=3)
    assert left_over(model) == 0


POINTS = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_post"]
POINTS += [f"attn.hook_{kind}" for kind in ("q", "k", "v", "z", "pattern")]


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_every_captured_activation_has_its_gradient(architecture: str, tokens: Tensor) -> None:
    model = toy.random(architecture)
    parallel = architecture == "gpt_neox"  # attention and MLP read the same stream: there is no middle
    names = [f"blocks.1.{point}" for point in POINTS if not (parallel and point == "hook_resid_mid")]
    plain = run(model, tokens, capture=names)
    done = run(model, tokens, capture=names, grad=True)
    assert torch.equal(done.logits, plain.logits)
    gradients = torch.autograd.grad(done.logits[:, -1, 7].sum(), list(done.cache.values()))
    for name, gradient in zip(done.cache, gradients, strict=True):
        assert gradient.shape == plain.cache[name].shape
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_z", "blocks.1.attn.hook_k", "blocks.0.hook_resid_post"])
def test_gradients_are_finite_differences(name: str, tokens: Tensor) -> None:
    model = toy.random("llama")
    done = run(model, tokens, capture=[name], grad=True)
    (gradient,) = torch.autograd.grad(done.logits[0, -1, 7], done.cache[name])
    assert gradient[1:].abs().max() == 0 < gradient[0].abs().max()  # prompts do not see each other
    # Along one direction, a finite difference of the same thing. Float32: steps of 0.01 leave 3 digits.
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    up, down = (
        run(model, tokens, hooks=[(name, lambda z, hook, s=s: z + s * direction)]).logits for s in (0.01, -0.01)
    )
    expected = (up - down)[0, -1, 7] / 0.02
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-2, atol=1e-2)
    assert not run(model, tokens, capture=[name]).cache[name].requires_grad


# --- prompts


def test_prompts_that_do_not_fit(model: Model) -> None:
    assert model(torch.full((1, 64), 5)).shape == (1, 64, 64)
    with pytest.raises(ValueError, match=r"the prompts have 65 tokens, but .* has a context of 64: cut them"):
        model(torch.full((1, 65), 5))
    for shape in ((0, 5), (2, 0), (5,)):
        with pytest.raises(ValueError, match=r"tokens have shape .*: give \[batch pos\]"):
            run(model, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_batched_equals_one_by_one(architecture: str) -> None:
    model = toy.random(architecture)
    tokens = toy.random_tokens(model, 5, 12)
    names = ["blocks.2.hook_resid_post", "blocks.1.attn.hook_pattern"]
    together = run(model, tokens, capture=names)
    for row in range(5):
        alone = run(model, tokens[row : row + 1], capture=names)
        torch.testing.assert_close(alone.logits[0], together.logits[row], **SAME)
        for name in names:
            torch.testing.assert_close(alone.cache[name][0], together.cache[name][row], **SAME)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_padded_equals_unpadded(architecture: str, side: str) -> None:
    model = toy.random(architecture)
    rows = [toy.random_tokens(model, 1, length, seed=length)[0] for length in (12, 3, 1, 10)]  # Mistral's window is 8
    texts = [" ".join(f"w{token}" for token in row.tolist()) for row in rows]
    ids, mask = model.tokenize(texts, padding_side=side)
    assert ids.shape == (4, 12)
    name = "blocks.2.hook_resid_post"
    padded = run(model, ids, mask=mask, capture=[name])
    for index, row in enumerate(rows):
        alone = run(model, row[None], capture=[name])
        real = mask[index].bool()
        assert torch.equal(ids[index, real], row)
        torch.testing.assert_close(padded.logits[index, real], alone.logits[0], **SAME)
        torch.testing.assert_close(padded.cache[name][index, real], alone.cache[name][0], rtol=1e-5, atol=3e-5)


def test_a_mask_of_ones_is_no_mask(model: Model, tokens: Tensor) -> None:
    assert torch.equal(model(tokens, torch.ones_like(tokens)), model(tokens))
    masked = torch.ones_like(tokens)
    masked[:, 0] = 0
    assert (model(tokens, masked) - model(tokens))[:, 1:].abs().max() > 0.1  # a mask is not ignored


def test_an_encoders_output_is_its_last_hidden_state(bert_folder: Any) -> None:
    model = load(bert_folder)
    ids, mask = model.tokenize(["w1 w2 w3", "w4"], padding_side="right")
    name = f"blocks.{model.n_layers - 1}.hook_resid_post"
    done = run(model, ids, mask=mask, capture=[name])
    assert done.logits.shape == (2, 5, 24)
    assert torch.equal(done.logits, done.cache[name])
    assert left_over(model) == 0


def test_the_nearest_names() -> None:
    known = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "hook_embed"]
    assert nearest("blocks.0.hook_resid_pst", known)[0] == "blocks.0.hook_resid_post"
    assert nearest("hook_embd", known, n=1) == ["hook_embed"]
    assert nearest("?", known) == []
