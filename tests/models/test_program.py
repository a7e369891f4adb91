"""Are a decoder's steps the decoder? Against its own hooks, on every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interp.models import load, program, toy
from interp.models.hooks import run
from interp.models.program import SITES, NoProgramError, forward, hook_name

#: OPT's score hook shows something else, and a parallel layer has no hook for the middle.
UNSEEN = {"opt": ("attn_scores",), "gpt_neox": ("resid_mid",), "phi": ("resid_mid",)}


@pytest.mark.parametrize("weights", ["processed", "raw"])
@pytest.mark.parametrize("architecture", toy.ARCHITECTURES + toy.VARIANTS)
def test_every_step_equals_its_hook(architecture: str, weights: str):
    model = toy.random(architecture, weights=weights)  # type: ignore[arg-type]
    tokens = toy.random_tokens(model, 3, 14)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    sites = [site for site in SITES if site not in UNSEEN.get(architecture, ())]
    names = {(site, layer): hook_name(site, layer) for site in sites for layer in range(3)}
    theirs = run(model, tokens, mask=mask, capture=list(names.values()))
    with torch.no_grad():
        logits, ours = forward(program.program(model), tokens, mask, capture=tuple(sites))
    real = mask.bool()
    # The same float32 arithmetic; fused maps sum in another order.
    assert torch.allclose(logits[real], theirs.logits[real], atol=2e-5)
    for key, name in names.items():
        seen, expected = ours[key], theirs.cache[name]
        assert seen.shape == expected.shape, name
        if key[0] in ("attn_scores", "pattern"):
            seen, expected = seen.transpose(1, 2), expected.transpose(1, 2)
        if key[0] == "attn_scores":
            seen, expected = seen.clamp(min=-1e4), expected.clamp(min=-1e4)  # forbidden is -inf or a large number
        assert torch.allclose(seen[real], expected[real], atol=3e-5), name


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_heads_sum_to_attention(architecture: str):
    model = toy.random(architecture)
    steps = program.program(model)
    tokens = toy.random_tokens(model, 2, 8)
    with torch.no_grad():
        _, cache = forward(steps, tokens, capture=("z", "attn_out"))
        z = cache["z", 1]
        bias = steps.attn_out(1, torch.zeros_like(z))
        heads = torch.einsum("bphd,hdm->bpm", z, steps.w_o(1))
    assert torch.allclose(heads + bias, cache["attn_out", 1], atol=2e-5)
    assert steps.w_o(1).shape == (4, model.d_head, model.d_model)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_directions_are_the_unembedding_of_single_tokens(architecture: str):
    model = toy.random(architecture)
    steps = program.program(model)
    normed = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows, bias = steps.directions(torch.tensor([[3, 9]]))
        few = torch.einsum("nd,bkd->nbk", normed, rows) + bias
        assert torch.allclose(few[:, 0], steps.unembed(normed)[:, [3, 9]], atol=2e-5)


def test_hook_names_are_the_fields():
    assert hook_name("resid_pre", 2) == "blocks.2.hook_resid_pre"
    assert hook_name("z", 0) == "blocks.0.attn.hook_z"
    assert hook_name("post", 1) == "blocks.1.mlp.hook_post"
    with pytest.raises(ValueError, match="use one of resid_pre"):
        hook_name("residual", 0)


def test_a_program_that_came_out_different_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = toy.random("llama", seed=3)
    build = program._build
    monkeypatch.setattr(program, "_build", lambda model: replace(build(model), scale=0.9 * build(model).scale))
    for _ in range(2):  # the verdict is kept
        with pytest.raises(NoProgramError, match="nats off the bridge's"):
            program.program(model)


def test_a_window_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch):
    model = toy.random("mistral", seed=4)
    build = program._build
    monkeypatch.setattr(program, "_build", lambda model: replace(build(model), window=None))
    # Without the window the check prompt of 12 tokens is longer than the 8 that a query may see.
    with pytest.raises(NoProgramError, match="nats off"):
        program.program(model)


def test_architectures_with_other_steps_are_refused_by_name():
    import transformers

    # GPT-J rotates neighbouring pairs, not halves.
    config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    with torch.random.fork_rng(devices=[]):
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = load(module.eval(), tokenizer=toy.tokenizer(), weights="raw")
    with pytest.raises(NoProgramError, match="GPTJForCausalLM has no layer-by-layer program"):
        program.program(model)
    with pytest.raises(NoProgramError, match="encoder, not a TransformerBridge of a decoder"):
        program.program(replace(toy.random("llama", seed=9), kind="encoder"))


def test_heads_behind_a_norm_have_no_part_of_their_own():
    steps = program.program(toy.random("gemma2", weights="raw"))
    assert not steps.heads_add
    with pytest.raises(NoProgramError, match="no head writes a part of its own"):
        steps.w_o(0)
