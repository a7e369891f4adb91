"""Does the fingerprint change exactly when the model does?"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

from interp.models import fingerprint, load, toy
from interp.models.fingerprint import of_file, of_folder, of_module


def test_a_files_fingerprint_is_its_sha256(tmp_path: Path) -> None:
    for size in (0, 1, 3_000_000):
        content = bytes(i % 251 for i in range(size))
        (tmp_path / "file").write_bytes(content)
        assert of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
        with (tmp_path / "file").open("rb") as stream:  # what Python 3.10 does
            assert fingerprint._chunks(stream) == hashlib.sha256(content).hexdigest()


def test_a_folder_is_its_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    before = of_folder(folder)
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, moved)
    (moved / "README.md").write_text("hello")
    (moved / "optimizer.pt").write_bytes(b"junk")
    assert of_folder(moved) == before == load(folder).fingerprint
    assert len(before) == 64


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_one_changed_byte_of_a_folder_changes_it(name: str, folder: Path) -> None:
    before = of_folder(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    changed = of_folder(folder)
    assert changed != before
    (folder / name).rename(folder / ("vocab.txt" if name == "tokenizer.json" else "other.safetensors"))
    assert of_folder(folder) not in (before, changed)


def add(module: nn.Module) -> None:
    with torch.no_grad():
        module.get_parameter("model.layers.2.mlp.up_proj.weight")[3, 4] += 1e-6


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight": add,
    "a type": lambda module: module.to(torch.bfloat16),
    "an activation function": lambda module: setattr(module.config, "hidden_act", "relu"),
    "rotary base": lambda module: module.config.rope_parameters.update(rope_theta=5.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_in_memory(change: str) -> None:
    module, again = toy.random_module("llama"), toy.random_module("llama")
    before = of_module(module, toy.tokenizer())
    assert of_module(again, toy.tokenizer()) == before
    again.config._name_or_path = "somewhere/else"
    assert of_module(again, toy.tokenizer()) == before  # where it was is not what it is
    CHANGES[change](again)
    assert of_module(again, toy.tokenizer()) != before
    assert of_module(module, toy.tokenizer(32)) != before
    assert of_module(module) != before


def test_processing_and_wrapping_do_not_change_it() -> None:
    module = toy.random_module("gpt2")
    given = of_module(module, toy.tokenizer())
    for weights in ("raw", "processed"):
        assert load(module, tokenizer=toy.tokenizer(), weights=weights).fingerprint == given
    assert load(module, tokenizer=toy.tokenizer()).provenance == {
        "model": "GPT2LMHeadModel", "model_fingerprint": given, "weights": "processed", "dtype": "float32",
    }  # fmt: skip


def test_every_tensor_counts_and_tied_ones_once() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(6.0)
            # Two views that start at the same number: a part of a fused weight, and the whole of it.
            self.register_buffer("a_part", whole[:2])
            self.register_buffer("whole", whole)

    first, second = Parts(), copy.deepcopy(Parts())
    second.whole[5] = 9.0
    assert of_module(first) != of_module(second)
    tied = toy.random_module("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    before = of_module(tied)
    with torch.no_grad():
        tied.lm_head.weight[2, 2] += 1
    assert of_module(tied) != before


def test_a_hooked_transformers_config_counts() -> None:
    def made(**options: object) -> str:
        sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "n_heads": 2, "d_vocab": 12, "seed": 0}
        with torch.random.fork_rng(devices=[]):
            return of_module(HookedTransformer(HookedTransformerConfig(**{**sizes, "act_fn": "gelu", **options})))

    assert made() == made(model_name="another name")
    assert len({made(), made(act_fn="relu"), made(use_attn_scale=False), made(seed=1)}) == 4
