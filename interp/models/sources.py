"""How do weights become a Hugging Face module? Folders, GGUF files and hub names; safetensors or GGUF only."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.models.hooks import nearest
from interp.models.packaged import catalogue

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SAFE_WAY = (
    "Loading it could run any code that its author put there. Use the model's safetensors weights, or convert it "
    "on a machine you can afford to lose: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)."
)


class UnsafeFileError(ValueError):
    """The only weights offered are pickled."""


class UnknownModelError(ValueError):
    """No model of that name can be found."""


def from_folder(folder: Path, dtype: torch.dtype, *, tokenizer: Any = None) -> tuple[nn.Module, Any]:
    """A module and its tokenizer from a local Hugging Face folder.

    Args:
        folder: holds config.json and safetensors weights.
        dtype: type to load the weights in.
        tokenizer: used instead of the folder's.

    Returns:
        (module, tokenizer); the tokenizer is None for a vision model.

    Raises:
        UnsafeFileError: the folder has pickled weights only.
        ValueError: the folder is incomplete, its weights are truncated or lack a tensor.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    if not list(folder.glob("*.safetensors")):
        pickled = [p.name for p in folder.iterdir() if p.suffix.lower() in _PICKLES]
        if pickled:
            raise UnsafeFileError(f"{folder} has pickled weights only ({pickled[0]}). {_SAFE_WAY}")
        raise ValueError(f"{folder} has no *.safetensors weights.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    try:
        with _quiet():
            module, report = _auto_class(config).from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", use_safetensors=True, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except (SafetensorError, OSError, EOFError) as error:
        raise ValueError(
            f"the weights in {folder} cannot be read ({error}): truncated? Download them again."
        ) from error
    _require_whole(folder, module, report["missing_keys"])
    if tokenizer is None and not hasattr(config, "image_size") and not hasattr(config, "vision_config"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} has no tokenizer that transformers can read: put its tokenizer.json there, or give one, "
                "load(folder, tokenizer=tokenizer)."
            ) from error
    return module.eval(), tokenizer


def from_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A dequantised module and its tokenizer from a GGUF file.

    Args:
        path: the file.
        dtype: type of the dequantised weights.

    Returns:
        (module, tokenizer). Cost: about 15 s for 135M parameters, each time.

    Raises:
        ValueError: the file is not GGUF, is truncated, or its architecture is not known to transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'.")
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=dtype, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except Exception as error:  # the reader raises whatever the broken bytes lead to
        raise ValueError(
            f"{path} cannot be read as a model ({type(error).__name__}: {error}): truncated, or an architecture "
            "that transformers does not read from GGUF."
        ) from error
    _require_whole(path, loaded, report["missing_keys"])
    # A fresh module: one loaded from GGUF carries a quantisation config that cannot be saved.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = path.stem
    module = type(loaded)(config)
    module.load_state_dict(loaded.state_dict())
    module.set_attn_implementation("eager")
    return cast(module, dtype).eval(), tokenizer


def _require_whole(where: Path, module: nn.Module, missing_keys: Iterable[str]) -> None:
    # transformers fills what a file lacks with random numbers and goes on. No method here reads a pooler.
    missing = sorted(key for key in missing_keys if "pooler" not in key)
    if missing:
        raise ValueError(
            f"the weights in {where} lack {len(missing)} of the tensors that {type(module).__name__} has "
            f"({', '.join(missing[:3])}): download them again, or save the whole model."
        )


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the weights another type, in place, as if they had been loaded in it.

    `module.to(dtype)` would also round what is computed rather than stored: the frequencies of rotary positions in
    bfloat16 are off by radians after a few hundred tokens.

    Args:
        module: any module.
        dtype: the new type of its parameters and saved buffers.

    Returns:
        The same module.
    """
    stored = module.state_dict(keep_vars=True).values()
    for tensor in stored:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module


def from_hub(name: str, dtype: torch.dtype, revision: str | None) -> tuple[Path, nn.Module, Any]:
    """Download a hub model's config, tokenizer and safetensors, then load the folder.

    Args:
        name: for example "gpt2" or "EleutherAI/pythia-160m".
        dtype: type to load the weights in.
        revision: branch, tag or commit.

    Returns:
        (snapshot folder, module, tokenizer).

    Raises:
        UnknownModelError: the hub has no such model, or cannot be reached; the nearest known names are offered.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    patterns = ["*.safetensors", "*.json", "tokenizer*", "vocab*", "merges.txt"]  # never a pickle
    try:
        files = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except GatedRepoError as error:
        raise UnknownModelError(
            f"{name} is gated: accept its terms on its page, then run `hf auth login`. ({error})"
        ) from None
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UnknownModelError(
            _unknown(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        ) from None
    folder = Path(files)
    if not list(folder.glob("*.safetensors")):
        raise UnsafeFileError(f"{name} offers no safetensors weights on the hub. {_SAFE_WAY}")
    return folder, *from_folder(folder, dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Reading local safetensors is a matter of milliseconds; a progress bar for it is noise in every notebook.
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_pickle(path: Path) -> None:
    """Raise for a pickled file, before anything is read.

    Args:
        path: what the user gave.

    Raises:
        UnsafeFileError: for .bin, .pt, .pth, .ckpt and .pkl files.
    """
    if path.suffix.lower() in _PICKLES:
        raise UnsafeFileError(f"{path} is a pickle. {_SAFE_WAY}")


def looks_like_hub_name(name: str) -> bool:
    """Whether a string can be a hub repository: "name" or "owner/name".

    Args:
        name: what the user gave.

    Returns:
        True for the form only; nothing is looked up.
    """
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def _unknown(name: str, reason: str) -> str:
    from transformer_lens.supported_models import MODEL_ALIASES

    known = [*catalogue(), *MODEL_ALIASES, *(alias for aliases in MODEL_ALIASES.values() for alias in aliases)]
    near = nearest(name, known)
    return (
        f"no model {name!r}: it is not packaged ({', '.join(catalogue())}), not a local path, and the hub did not "
        f"give it ({reason})." + (f" Nearest known names: {', '.join(near)}." if near else "")
    )


def unknown_source(name: str) -> UnknownModelError:
    """The error for a name that is neither packaged, nor a path, nor a possible hub name.

    Args:
        name: what the user gave.

    Returns:
        The exception to raise.
    """
    return UnknownModelError(_unknown(name, "not a valid repository name"))


def save_folder(module: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a module and tokenizer as a Hugging Face folder of safetensors.

    Args:
        module: a Hugging Face module.
        tokenizer: its tokenizer, or None.
        folder: created if it is missing.
    """
    with _quiet():
        module.save_pretrained(os.fspath(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(os.fspath(folder))


def processed_copy(folder: Path) -> nn.Module:
    """A Hugging Face module whose weights TransformerLens has processed (norms folded, unembedding centred).

    Processing takes 1 to 5 s of CPU for the default model (it copies the weights three times) and its outcome never
    changes, so it is stored.
    Only for architectures whose processed weights fit their own module (RMSNorm, no biases: Llama and kin).

    Args:
        folder: a raw model folder.

    Returns:
        A module with untied embeddings that computes the same log-probabilities.
    """
    from transformers import AutoModelForCausalLM

    from interp.models.load import boot

    raw, tokenizer = from_folder(folder, torch.float32)
    config = copy.deepcopy(raw.config)
    config.tie_word_embeddings = False
    bridge = boot(raw, tokenizer, folder.name, process=True)
    stored = {
        key.replace("._original_component", ""): value for key, value in bridge.original_model.state_dict().items()
    }
    module = AutoModelForCausalLM.from_config(config)
    module.load_state_dict({key: stored[key] for key in module.state_dict()})
    return module.eval()


def _auto_class(config: Any) -> Any:
    import transformers

    # The class that wrote the folder: an Auto class would give a BERT encoder a randomly initialised head.
    written_by = (getattr(config, "architectures", None) or [None])[0]
    if written_by and hasattr(transformers, written_by):
        return getattr(transformers, written_by)
    return transformers.AutoModelForCausalLM
