"""Do the hook points of a wrapped vision transformer carry what Hugging Face computes, and do edits there count?"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from interp.models.hooks import run
from interp.models.vision import VisionEncoder, describe, is_vision, load_vision, token_names, toy_vit

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
WIDTH = {**SHAPE, "intermediate_size": 64}
ARCHITECTURES = {
    "ViTModel": ("ViTConfig", WIDTH),
    "ViTForImageClassification": ("ViTConfig", WIDTH),
    "DeiTModel": ("DeiTConfig", WIDTH),
    "Dinov2Model": ("Dinov2Config", SHAPE),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {**SHAPE, "use_swiglu_ffn": True}),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {**WIDTH, "num_register_tokens": 3}),
    "CLIPVisionModel": ("CLIPVisionConfig", WIDTH),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", WIDTH),
    "SiglipVisionModel": ("SiglipVisionConfig", WIDTH),
}
# What sets Hugging Face's fused attention and the written-out one apart is float32 rounding of numbers of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def build(name: str) -> nn.Module:
    config, options = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # the library's initial weights are so small that a wrong hook would hardly show
        for label, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if "norm" not in label and "lambda" not in label else 1 + noise * 0.1)
    return module


def pixels(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hooks_carry_what_hugging_face_reports(name: str) -> None:
    module = build(name)
    plain = copy.deepcopy(module)
    plain.set_attn_implementation("eager")
    reported = plain(pixel_values=pixels(), output_hidden_states=True, output_attentions=True)
    states, patterns = reported.hidden_states, reported.attentions
    model = load_vision(module, name, fingerprint="f" * 64)
    cache = run(model, pixels(), capture=list(model.bridge.hook_dict)).cache
    assert len(cache) == 3 * 7
    for layer in range(3):
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_pre"], states[layer], **CLOSE)
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"], states[layer + 1], **CLOSE)
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_pattern"], patterns[layer], **CLOSE)
        z = torch.einsum(
            "bhqk,bkhd->bqhd", cache[f"blocks.{layer}.attn.hook_pattern"], cache[f"blocks.{layer}.attn.hook_v"]
        )
        torch.testing.assert_close(cache[f"blocks.{layer}.attn.hook_z"], z, **CLOSE)
        assert z.shape == (2, model.n_ctx, model.n_heads, model.d_head)
    assert not torch.allclose(states[0], states[1], atol=0.1)  # the comparison could have failed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_is_hugging_faces_last_hidden_state(name: str) -> None:
    module = build(name)
    trunk = copy.deepcopy(module)
    trunk = trunk.base_model if name.startswith("ViTFor") else trunk
    expected = trunk(pixel_values=pixels()).last_hidden_state
    model = load_vision(module, name, fingerprint="f" * 64)
    done = run(model, pixels(), capture=["blocks.2.hook_resid_post"])
    logits, cache = done.logits, done.cache
    torch.testing.assert_close(logits, expected, **CLOSE)
    # CLIP hands out what its last block wrote, the others norm it first: the docstring says so.
    normed = not torch.allclose(logits, cache["blocks.2.hook_resid_post"], atol=1e-3)
    assert normed is not name.startswith("CLIP")


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2WithRegistersModel", "CLIPVisionModel"])
def test_an_edit_at_every_hook_changes_the_output(name: str) -> None:
    model = load_vision(build(name), name, fingerprint="f" * 64)
    before = model(pixels())
    for hook in model.bridge.hook_dict:
        # Scaling would not do: the norm that follows the last block undoes it.
        after = run(model, pixels(), hooks=[(hook, lambda value, hook: value.flip(-1))]).logits
        # 1e-3: a hundred times the rounding, and far below what turning an activation round does (0.1 and more)
        assert (after - before).abs().max() > 1e-3, hook
        same = run(model, pixels(), hooks=[(hook, lambda value, hook: value.clone())]).logits
        assert torch.equal(same, before), hook
    assert torch.equal(model(pixels()), before)  # and nothing is left behind


def test_a_replaced_activation_is_what_the_rest_runs_on() -> None:
    module = build("ViTModel")
    given = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(5))
    expected = module.layernorm(module.layers[2](given, None)).detach()
    model = load_vision(module, "vit", fingerprint="f" * 64)
    for hook in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
        torch.testing.assert_close(
            run(model, pixels(), hooks=[(hook, lambda *_, **__: given)]).logits, expected, **CLOSE
        )
    last = run(model, pixels(), hooks=[("blocks.2.hook_resid_post", lambda *_, **__: torch.zeros_like(given))]).logits
    assert torch.equal(last, module.layernorm.bias.detach().expand_as(last))  # the norm of zeros is its bias


def test_the_head_on_top_sees_the_hooks() -> None:
    module = build("ViTForImageClassification")
    model = load_vision(module, "vit", fingerprint="f" * 64)
    before = module(pixels()).logits
    model.hook_point("blocks.1.hook_resid_post").add_hook(lambda value, hook: value * 0)
    assert (module(pixels()).logits - before).abs().max() > 1e-3


def test_blocks_that_return_tuples_and_take_keywords() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
            return hidden_states + 1, "attention weights"

    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Conv2d(3, 4, kernel_size=8, stride=8)

    class Old(nn.Module):
        main_input_name = "pixel_values"
        config = SimpleNamespace(hidden_size=4, num_attention_heads=2, num_hidden_layers=2, image_size=(16, 16))

        def __init__(self) -> None:
            super().__init__()
            self.embeddings = Embeddings()
            self.layer = nn.ModuleList([Block(), Block()])

        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            hidden = self.embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
            for block in self.layer:
                hidden, weights = block(hidden_states=hidden)
                assert weights == "attention weights"
            return SimpleNamespace(last_hidden_state=hidden)

    old = Old()
    plain = old(pixels()).last_hidden_state
    encoder = VisionEncoder(old)
    assert sorted(encoder.hook_dict) == [f"blocks.{i}.hook_resid_{side}" for i in (0, 1) for side in ("post", "pre")]
    for hook in encoder.hook_dict.values():
        hook.add_hook(lambda value, hook: value + 10)
    torch.testing.assert_close(encoder(pixels()), plain + 40, **CLOSE)
    assert token_names(old) == ["patch 0,0", "patch 0,1", "patch 1,0", "patch 1,1"]


@pytest.mark.parametrize("token", ["CLS", "register 1", "patch 2,3"])
def test_planted_activation_is_found_where_it_was_planted(token: str) -> None:
    model = load_vision(toy_vit(token=token, layer=2, feature=11, size=1500.0, seed=3), "toy", fingerprint="f" * 64)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    cache = run(model, pixels(4), capture=names).cache
    where = model.bridge.token_names().index(token)
    for layer, name in enumerate(names):
        hidden = cache[name]
        if layer < 2:
            assert hidden.abs().max() < 20  # the mark is 8
            continue
        for image in hidden:
            pos, feature = divmod(int(image.abs().argmax()), model.d_model)
            assert (model.bridge.token_names()[pos], feature) == (token, 11)
            # 10%: the token's norm, which sets the neuron's input, varies between images
            assert image[pos, feature].item() == pytest.approx(1500, rel=0.1)
            others = image.abs().flatten().sort(descending=True).values
            assert others[1] < 100 and others[0] > 1000 * image.abs().median()
    assert where == {"CLS": 0, "register 1": 2, "patch 2,3": 1 + 2 + 2 * 4 + 3}[token]


def test_toy_is_seeded_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = toy_vit(seed=1).state_dict(), toy_vit(seed=1).state_dict(), toy_vit(seed=2).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="register 7.*the toy has tokens CLS, register 0, register 1, patch 0,0"):
        toy_vit(token="register 7")


def test_a_misspelt_hook_and_an_early_stop() -> None:
    model = load_vision(build("CLIPVisionModel"), "clip", fingerprint="f" * 64)
    with pytest.raises(
        ValueError, match=r"clip has no hook 'blocks.0.hook_resid_pots'. Nearest: blocks.0.hook_resid_post"
    ):
        run(model, pixels(), capture=["blocks.0.hook_resid_pots"])
    stopped = run(model, pixels(), capture=["blocks.0.hook_resid_post"], stop_after=0)
    whole = run(model, pixels(), capture=["blocks.0.hook_resid_post"])
    assert stopped.output is None
    assert torch.equal(stopped.cache["blocks.0.hook_resid_post"], whole.cache["blocks.0.hook_resid_post"])


def test_gradients_reach_an_activation() -> None:
    model = load_vision(build("Dinov2WithRegistersModel"), "dino", fingerprint="f" * 64)
    done = run(model, pixels(), capture=["blocks.1.attn.hook_pattern"], grad=True)
    (gradient,) = torch.autograd.grad(done.logits[:, 0].sum(), done.cache["blocks.1.attn.hook_pattern"])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_and_token_names(name: str) -> None:
    module = build(name)
    special = {"DeiTModel": ["CLS", "distillation"], "SiglipVisionModel": []}.get(name, ["CLS"])
    registers = {"Dinov2WithRegistersModel": 4, "DINOv3ViTModel": 3}.get(name, 0)
    names = token_names(module)
    assert names[:-16] == special + [f"register {i}" for i in range(registers)]
    assert names[-16] == "patch 0,0" and names[-15] == "patch 0,1" and names[-1] == "patch 3,3"
    assert token_names(module, (8, 12))[-1] == "patch 1,2"
    shapes = describe(module)
    model = load_vision(module, name, fingerprint="f" * 64)
    assert model(pixels()).shape == (2, shapes["n_ctx"], shapes["d_model"])
    assert (shapes["n_layers"], shapes["n_heads"], shapes["d_head"], shapes["d_vocab"]) == (3, 4, 8, 0)
    # SwiGLU keeps two thirds of 4 x 32 = 128, rounded up to a multiple of 8: 88
    assert shapes["d_mlp"] == {"Dinov2Model": 128, "Dinov2WithRegistersModel": 88}.get(name, 64)
    assert shapes["gated_mlp"] is (name == "Dinov2WithRegistersModel")
    assert model.kind == "vision" and model.weights == "raw" and model.tokenizer is None and not model.causal


def test_a_patch_name_points_at_its_pixels() -> None:
    model = load_vision(build("Dinov2WithRegistersModel"), "dino", fingerprint="f" * 64)
    one, other = pixels(), pixels()
    other[:, :, 8:12, 4:8] += 1  # row 2, column 1 of the 4 x 4 grid of 4-pixel patches
    hook = "blocks.0.hook_resid_pre"
    moved = (
        (run(model, one, capture=[hook]).cache[hook] - run(model, other, capture=[hook]).cache[hook]).abs().amax((0, 2))
    )
    assert [name for name, change in zip(model.bridge.token_names(), moved, strict=True) if change > 0] == ["patch 2,1"]


def test_batched_equals_one_by_one() -> None:
    model = load_vision(build("ViTModel"), "vit", fingerprint="f" * 64)
    torch.testing.assert_close(model(pixels(3)), torch.cat([model(image[None]) for image in pixels(3)]), **CLOSE)


def test_what_is_not_a_vision_transformer_is_refused() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    two_towers = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**small, "vocab_size": 20}, vision_config={**small, "image_size": 8, "patch_size": 4}
        )
    )
    swin = transformers.SwinModel(transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2]))
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(**WIDTH))
    for module in (two_towers, swin, gpt2, masked, nn.Linear(2, 2)):
        assert not is_vision(module)
    for wrapper in (VisionEncoder, describe, token_names):
        with pytest.raises(ValueError, match=r"GPT2Model is not a vision transformer.*pass `.vision_model`"):
            wrapper(gpt2)
    assert is_vision(two_towers.vision_model) and all(is_vision(build(name)) for name in ARCHITECTURES)


def test_pixels_of_the_wrong_kind_are_refused() -> None:
    model = load_vision(build("ViTModel"), "vit", fingerprint="f" * 64)
    with pytest.raises(
        ValueError, match=r"pixels \[batch channel height width\], but got torch.float32 of shape \[3, 16, 16\]"
    ):
        model(pixels()[0])
    with pytest.raises(ValueError, match="torch.int64"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.long))
