"""Does every way of loading give the model that was meant, and does a wrong way say so?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformer_lens import HookedEncoder, HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

from interp.models import Model, load, packaged, run, sources, toy
from interp.models.load import boot

# The same float32 weights through another graph: rounding of logits of order 10, in sums of tens of terms.
SAME = {"rtol": 0.0, "atol": 3e-5}
# Processing multiplies and subtracts weights before they are rounded: the tolerance that `load` promises.
PROCESSED = {"rtol": 0.0, "atol": 1e-4}
TOKENS = torch.randint(2, 64, (3, 17), generator=torch.Generator().manual_seed(0))


def log_probs(model: Model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens).log_softmax(-1)


def hooked(**options: Any) -> HookedTransformer:
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 4, "n_heads": 4, "d_vocab": 64, "seed": 0}
    config = HookedTransformerConfig(**{**sizes, "act_fn": "gelu", "d_mlp": 24, "normalization_type": "LN", **options})
    with torch.random.fork_rng(devices=[]):
        return HookedTransformer(config)


# --- the packaged models


def test_the_default_model_is_hugging_faces(smol_raw: Model, smol: Model) -> None:
    folder = packaged.folder_of("smollm2-135m") / "raw"
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = smol_raw.tokenize("When Mary and John went to the store, John gave a drink to").ids
    with torch.no_grad():
        expected = plain(tokens).logits
    torch.testing.assert_close(smol_raw(tokens), expected, **SAME)
    torch.testing.assert_close(log_probs(smol, tokens), expected.log_softmax(-1), **PROCESSED)
    assert smol.to_str_tokens(smol(tokens)[0, -1].argmax()[None]) == [" Mary"]
    assert (smol.weights, smol_raw.weights, smol.kind) == ("processed", "raw", "decoder")
    assert smol.fingerprint == smol_raw.fingerprint


def test_queries_have_heads_and_keys_and_values_have_groups(smol: Model) -> None:
    assert (smol.n_layers, smol.n_heads, smol.n_key_value_heads) == (30, 9, 3)
    assert (smol.d_model, smol.d_head, smol.d_mlp, smol.d_vocab, smol.n_ctx) == (576, 64, 1536, 49152, 8192)
    names = {kind: f"blocks.4.attn.hook_{kind}" for kind in ("q", "k", "v", "z", "pattern")}
    cache = run(smol, TOKENS[:1], capture=list(names.values()), stop_after=4).cache
    shapes = {kind: tuple(cache[name].shape) for kind, name in names.items()}
    assert shapes["q"] == shapes["z"] == (1, 17, 9, 64)
    assert shapes["k"] == shapes["v"] == (1, 17, 3, 64)
    assert shapes["pattern"] == (1, 9, 17, 17)


def test_the_encoder_is_hugging_faces() -> None:
    model = load("minilm-l6")
    plain = transformers.BertModel.from_pretrained(packaged.folder_of("minilm-l6") / "raw", attn_implementation="eager")
    texts = ["A cat sat on the mat.", "The feline rested.", "Interest rates rose by half a point in March."]
    for side in ("left", "right"):
        ids, mask = model.tokenize(texts, padding_side=side)
        output = model(ids, mask)
        for row, text in enumerate(texts):
            alone = model.tokenize(text).ids
            assert alone[0, 0] == model.tokenizer.cls_token_id
            with torch.no_grad():
                # Hugging Face's own positions count the padding on the left: it is right for one text at a time.
                expected = plain(alone).last_hidden_state[0]
            torch.testing.assert_close(output[row, mask[row].bool()], expected, **SAME)
    assert (model.kind, model.causal, model.weights, model.n_layers, model.n_heads) == ("encoder", False, "raw", 6, 12)


# --- every architecture, from memory and from a folder


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_raw_is_hugging_faces_and_processed_has_its_log_probabilities(architecture: str) -> None:
    module = toy.random_module(architecture)
    with torch.no_grad():
        expected = module(TOKENS).logits
    raw, processed = (toy.random(architecture, weights=weights) for weights in ("raw", "processed"))
    torch.testing.assert_close(raw(TOKENS), expected, **SAME)
    torch.testing.assert_close(log_probs(processed), expected.log_softmax(-1), **PROCESSED)
    assert (raw.weights, processed.weights) == ("raw", "processed")
    centred = processed(TOKENS)  # what processing is for: the unembedding is centred, so logits have mean zero
    assert centred.mean(-1).abs().max() < 1e-3 < raw(TOKENS).mean(-1).abs().max()


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_a_module_in_memory_equals_its_folder(architecture: str, tmp_path: Path) -> None:
    module = toy.random_module(architecture)
    sources.save_folder(module, toy.tokenizer(), tmp_path / "saved")
    for weights in ("raw", "processed"):
        memory = load(module, tokenizer=toy.tokenizer(), weights=weights)
        folder = load(tmp_path / "saved", weights=weights)
        assert torch.equal(memory(TOKENS), folder(TOKENS))
    assert folder.name == "saved"
    shapes = ("n_layers", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "gated_mlp")
    assert [getattr(memory, s) for s in shapes] == [getattr(folder, s) for s in shapes]


@pytest.mark.parametrize(
    ("architecture", "groups", "d_head", "gated"),
    [
        ("gpt2", 4, 8, False), ("llama", 2, 8, True), ("gpt_neox", 4, 8, False), ("gemma", 1, 16, True),
        ("mistral", 2, 8, True), ("qwen2", 2, 8, True), ("opt", 4, 8, False),
    ],
)  # fmt: skip
def test_shapes_of_each_architecture(architecture: str, groups: int, d_head: int, gated: bool) -> None:
    model = toy.random(architecture)
    assert (model.n_layers, model.n_heads, model.d_model, model.d_mlp) == (3, 4, 32, 48)
    assert (model.n_key_value_heads, model.d_head, model.gated_mlp) == (groups, d_head, gated)
    assert (model.d_vocab, model.n_ctx, model.causal, model.kind) == (64, 64, True, "decoder")


@pytest.mark.parametrize("weights", ["raw", "processed"])
def test_the_users_module_stays_as_it_was(weights: Any) -> None:
    module = toy.random_module("gpt2").train()
    module.set_attn_implementation("sdpa")
    module.lm_head.weight.requires_grad_(False)
    before, tokenizer = copy.deepcopy(module.state_dict()), toy.tokenizer()
    kind, layers = type(module.transformer.h[0]), [name for name, _ in module.named_modules()]
    load(module, tokenizer=tokenizer, weights=weights, dtype="bfloat16")
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)
    assert module.training and module.config._attn_implementation == "sdpa"
    assert type(module.transformer.h[0]) is kind and [name for name, _ in module.named_modules()] == layers
    assert not module.lm_head.weight.requires_grad
    assert len(tokenizer) == 64 and tokenizer("w2")["input_ids"] == [2]


def test_loading_draws_nothing_from_the_callers_generator(bert_folder: Path, tiny_gguf: Path) -> None:
    for given in (toy.random_module("gpt2"), bert_folder, tiny_gguf):
        torch.manual_seed(3)
        load(given, tokenizer=toy.tokenizer())
        after = torch.rand(2)
        torch.manual_seed(3)
        assert torch.equal(after, torch.rand(2)), given


# --- GGUF


def test_a_gguf_file_is_the_model_that_was_written(tiny_gguf: Path, llama_module: nn.Module) -> None:
    tokens = torch.arange(260).reshape(10, 26)
    with torch.no_grad():
        expected = llama_module(tokens).logits
    # Rotary positions are stored in another order: a wrong one would change every logit after the first position.
    raw = load(tiny_gguf, weights="raw")
    torch.testing.assert_close(raw(tokens), expected, **SAME)
    processed = load(str(tiny_gguf))
    torch.testing.assert_close(log_probs(processed, tokens), expected.log_softmax(-1), **PROCESSED)
    assert (raw.name, raw.n_heads, raw.n_key_value_heads) == ("tiny", 4, 2)
    assert raw.to_str_tokens(raw.tokenize("the the cat").ids[0]) == ["t", "he", " t", "he", " ", "c", "a", "t"]


# --- what a user already has


@pytest.mark.parametrize("options", [{}, {"attn_only": True, "d_mlp": None}, {"normalization_type": "LNPre"}])
def test_a_hooked_transformer_is_used_as_it_is(options: dict[str, Any]) -> None:
    given = hooked(**options)
    model = load(given, tokenizer=toy.tokenizer())
    assert model.bridge is given
    assert torch.equal(model(TOKENS), given(TOKENS))
    assert model.weights == ("processed" if options.get("normalization_type") == "LNPre" else "raw")
    assert (model.n_layers, model.n_heads, model.d_vocab, model.causal) == (2, 4, 64, True)
    assert model.d_mlp == (0 if options.get("attn_only") else 24)
    ids, mask = model.tokenize(["w2 w3 w4", "w5 w6 w7 w8 w9"])
    torch.testing.assert_close(model(ids, mask)[0, 2:], model(ids[:1, 2:])[0], **SAME)
    wanted = "raw" if model.weights == "processed" else "processed"
    with pytest.raises(ValueError, match=f"this HookedTransformer has {model.weights} weights, but weights='{wanted}'"):
        load(given, weights=wanted)


def test_a_hooked_encoder_is_refused_with_the_way_out() -> None:
    given = HookedEncoder(hooked().cfg)
    given.cfg.attention_dir = "bidirectional"
    with pytest.raises(ValueError, match=r"a HookedEncoder attends in both directions.*load\(module, tokenizer"):
        load(given)


@pytest.mark.parametrize("process", [False, True])
def test_a_bridge_is_used_as_it_is(process: bool) -> None:
    given = boot(toy.random_module("llama"), toy.tokenizer(), "mine", process=process)
    assert isinstance(given, TransformerBridge)
    model = load(given)
    assert model.bridge is given
    assert model.weights == ("processed" if process else "raw")
    expected = toy.random_module("llama")(TOKENS).logits.log_softmax(-1)
    torch.testing.assert_close(log_probs(model), expected, **PROCESSED)
    assert model.tokenizer("w2 w3")["input_ids"] == [2, 3]


# --- options


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
@pytest.mark.parametrize("weights", ["raw", "processed"])
def test_bfloat16(architecture: str, weights: Any) -> None:
    module = toy.random_module(architecture)
    model = load(module, tokenizer=toy.tokenizer(), weights=weights, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 == load(module, tokenizer=toy.tokenizer(), dtype=torch.bfloat16).dtype
    assert {p.dtype for p in model.bridge.parameters()} == {torch.bfloat16}
    exact, found = (
        toy.random(architecture, weights="raw")(TOKENS).log_softmax(-1),
        model(TOKENS).float().log_softmax(-1),
    )
    # 8 bits of mantissa through three layers: logits of order 5 are off by some hundredths, so a divergence below 0.02.
    divergence = (exact.exp() * (exact - found)).sum(-1).mean()
    assert 0 < divergence < 0.02


def test_bfloat16_does_not_round_the_rotary_frequencies() -> None:
    model = load(toy.random_module("llama"), tokenizer=toy.tokenizer(), dtype="bfloat16")
    frequencies = {name: buffer for name, buffer in model.bridge.named_buffers() if name.endswith("inv_freq")}
    assert frequencies
    assert {buffer.dtype for buffer in frequencies.values()} == {torch.float32}
