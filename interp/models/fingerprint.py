"""Which model is this, exactly? SHA-256 over config, tokenizer and weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: The files of a model folder that decide what it computes.
_CONTENT = ("config.json", "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")

#: Fields of a config that do not decide what the model computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "device", "n_devices", "model_name", "tokenizer_name", "seed")


def of_file(path: Path) -> str:
    """SHA-256 of one file.

    Args:
        path: any file.

    Returns:
        The digest in hex. Cost: one read, about 1 GB/s.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _chunks(stream)


def _chunks(stream: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def of_folder(folder: Path) -> str:
    """SHA-256 of a Hugging Face folder: its config, tokenizer and safetensors files, by name and content.

    Args:
        folder: a local folder.

    Returns:
        The digest in hex; independent of where the folder lies and of files that change nothing (README ...).
    """
    files = [folder / name for name in _CONTENT if (folder / name).is_file()] + sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{of_file(file)}\n".encode())
    return digest.hexdigest()


def of_module(module: nn.Module, tokenizer: Any = None) -> str:
    """SHA-256 of a module in memory: its config, its tokenizer's vocabulary and its tensors.

    Args:
        module: a Hugging Face module, or a TransformerLens one.
        tokenizer: its tokenizer, if it has one.

    Returns:
        The digest in hex. Cost: one pass over the weights, about 1 GB/s.
    """
    digest = hashlib.sha256()
    config = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        config = getattr(module, "cfg", None)  # TransformerLens's name for it
    if hasattr(config, "to_dict"):
        # Paths, versions and devices say where the weights were, not what they are.
        fields = {k: v for k, v in config.to_dict().items() if k not in _INCIDENTAL}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    if hasattr(tokenizer, "get_vocab"):
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in sorted(module.state_dict().items()):
        if not hasattr(tensor, "data_ptr") or (tensor.data_ptr(), tensor.shape) in seen:
            continue  # tied weights count once
        seen.add((tensor.data_ptr(), tensor.shape))
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten()
        digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()
