"""Is what cannot be loaded refused, with what was given, what is needed and what to do?"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from interp.models import UnknownModelError, UnsafeFileError, load, toy


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    mark = tmp_path / "unpickled"
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)
    assert mark.is_dir()  # it works
    mark.rmdir()
    return content


# --- pickles


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "MODEL.BIN"])
@pytest.mark.parametrize("there", [True, False])
def test_a_pickle_is_refused_unread(name: str, there: bool, bomb: bytes, tmp_path: Path) -> None:
    if there:
        (tmp_path / name).write_bytes(bomb)
    with pytest.raises(UnsafeFileError, match=rf"{name} is a pickle\. .*safetensors.*save_pretrained"):
        load(tmp_path / name)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.PT"])
def test_a_folder_of_pickles_is_refused_unread(name: str, bomb: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(bomb)
    with pytest.raises(UnsafeFileError, match=rf"my-llama has pickled weights only \({name}\)\. .*safetensors"):
        load(folder)
    assert not (tmp_path / "unpickled").exists()


def test_pickles_beside_safetensors_are_left_alone(bomb: bytes, folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(bomb)
    assert load(folder).n_layers == 3
    # Weights of another name are no reason to take the pickle.
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    with pytest.raises(ValueError, match="the weights in .*my-llama cannot be read"):
        load(folder)
    assert not (tmp_path / "unpickled").exists()


# --- folders


@pytest.mark.parametrize("keep", [0, 4, 500, -100])
def test_truncated_safetensors_are_refused(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"the weights in .*my-llama cannot be read \(.*\): truncated\?"):
        load(folder)


def test_safetensors_that_lack_a_tensor_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="lack 2 of the tensors that LlamaForCausalLM has .*layers.1.mlp.up_proj.weight"
    ):
        load(folder)


def test_a_folder_without_what_a_model_needs(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"my-llama has no tokenizer .*load\(folder, tokenizer=tokenizer\)"):
        load(folder)
    assert load(folder, tokenizer=toy.tokenizer()).single_token("w5") == 5
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"my-llama has no \*\.safetensors weights"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="my-llama has no config.json: it is not a Hugging Face model folder"):
        load(folder)


# --- GGUF files


@pytest.mark.parametrize("size", [0, 3, 100, 60_000, -40])
def test_a_truncated_gguf_is_refused(tiny_gguf: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.gguf (is not a GGUF file|cannot be read as a model .*: truncated)"):
        load(tmp_path / "cut.gguf")


def test_a_gguf_that_lacks_a_tensor_is_refused(llama_module: nn.Module, tmp_path: Path, gguf_writer: Callable) -> None:
    state = {name: tensor for name, tensor in llama_module.state_dict().items() if "1.mlp.up_proj" not in name}
    path = gguf_writer(tmp_path / "lacking.gguf", llama_module.config, state)
    with pytest.raises(ValueError, match=r"lacking.gguf lack 1 of the tensors .*model.layers.1.mlp.up_proj.weight"):
        load(path)


def test_what_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match=r"fake.gguf is not a GGUF file: it starts with b'PK\\x03\\x04', not b'GGUF'"):
        load(tmp_path / "fake.gguf")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.gguf"):
        load(tmp_path / "none.gguf")


# --- options


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "bfloat17"}, "dtype='bfloat17': use a floating-point type"),
        ({"dtype": "int8"}, "dtype='int8': use a floating-point type"),
        ({"dtype": "nn"}, "dtype='nn': use a floating-point type"),
        ({"revision": "main"}, "revision='main' is for hub models; LlamaForCausalLM is pinned by its fingerprint"),
    ],
)
def test_an_option_that_does_not_fit(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load(toy.random_module("llama"), tokenizer=toy.tokenizer(), **options)


def test_no_gpu_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'device="cuda:1", but this torch \(.*\) sees no CUDA GPU: use device="cpu"'):
        load("a-model-that-is-not-there", device="cuda:1")


@pytest.mark.parametrize("local", ["a folder", "a folder in sight", "a file", "packaged"])
def test_a_revision_is_for_the_hub_only(
    local: str, folder: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)  # "my-llama" could also be a hub name
    given = {"a folder": folder, "a folder in sight": "my-llama", "a file": tiny_gguf, "packaged": "smollm2-135m"}
    with pytest.raises(ValueError, match=r"revision='v1' is for hub models; .* is pinned by its fingerprint"):
        load(given[local], revision="v1")
    assert load("my-llama").n_layers == 3


def test_a_module_needs_its_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"is a module in memory: give its tokenizer too, load\(module, tokenizer="):
        load(toy.random_module("llama"))


def test_another_weight_mode_is_refused() -> None:
    # Below the run-time type checks of the test run, which would speak first: a user has none.
    with pytest.raises(ValueError, match='weights=\'folded\': use "processed", "raw" or None'):
        load.__wrapped__(toy.random_module("llama"), weights="folded")


# --- names and the hub


def refusing(error: Exception) -> Callable[..., str]:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    return snapshot_download


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://example.org"))


@pytest.mark.parametrize(
    ("name", "near"),
    [("smollm2-135", "smollm2-135m"), ("gpt-2", "gpt2"), ("pythia-160", "pythia-160m"), ("minilm", "minilm-l6")],
)
def test_an_unknown_name_offers_the_nearest_known(name: str, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RepositoryNotFoundError("404 Client Error.\nRepository Not Found", response=response(404))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing(missing))
    with pytest.raises(UnknownModelError) as caught:
        load(name)
    text = str(caught.value)
    assert text.startswith(f"no model {name!r}: it is not packaged (smollm2-135m, minilm-l6")
    assert "RepositoryNotFoundError" in text
    assert near in text.split("Nearest known names: ")[1].rstrip(".").split(", ")


@pytest.mark.parametrize("name", ["a/b/c", "no such model", "./nowhere", "/nowhere/at/all"])
def test_a_name_that_can_be_nothing_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing(AssertionError("looked up")))
    with pytest.raises(UnknownModelError, match=r"not a local path, and the hub did not give it \(not a valid"):
        load(name)


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Name or service not known"), TimeoutError("timed out"), OSError(28, "No space left on device")],
)
def test_no_network(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing(error))
    with pytest.raises(UnknownModelError, match=rf"no model 'gpt2': .*{type(error).__name__}: .*{error.args[-1]}"):
        load("gpt2")


def test_offline_mode_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownModelError, match="no model 'EleutherAI/pythia-160m': .* the hub did not give it"):
        load("EleutherAI/pythia-160m")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_gated_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refusing(GatedRepoError("403", response=response(403))))
    with pytest.raises(UnknownModelError, match="meta/llama is gated: accept its terms .*hf auth login"):
        load("meta/llama")


def test_a_hub_model_is_its_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load("someone/some-llama", revision="v2", weights="raw")
    tokens = toy.random_tokens(model, 2, 9)
    assert torch.equal(model(tokens), load(folder, weights="raw")(tokens))
    assert (model.name, model.fingerprint) == ("someone/some-llama", load(folder).fingerprint)
    (call,) = asked
    assert (call["name"], call["revision"]) == ("someone/some-llama", "v2")
    assert "*.safetensors" in call["allow_patterns"]
    pickles = ["pytorch_model.bin", "model.pt", "training_args.bin", "model.pth", "model.ckpt"]
    assert not list(huggingface_hub.utils.filter_repo_objects(pickles, allow_patterns=call["allow_patterns"]))
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UnsafeFileError, match="someone/some-llama offers no safetensors weights on the hub"):
        load("someone/some-llama")
