"""Load any transformer: packaged, hub, local folder, GGUF, or a module already in memory."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.models import check, fingerprint, packaged, sources
from interp.models.model import Model, Weights


def load(
    source: str | os.PathLike[str] | nn.Module,
    *,
    weights: Weights | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
) -> Model:
    """Load a transformer, with TransformerLens's hook names, and check that it works before handing it over.

    Args:
        source: a packaged model ("smollm2-135m", "minilm-l6"), a local Hugging Face folder, a `.gguf` file, a hub
            name ("gpt2", "EleutherAI/pythia-160m"), a Hugging Face module in memory (copied: yours stays as it is),
            or a TransformerBridge or HookedTransformer (used as it is).
        weights: "processed" (norms folded, writing weights and unembedding centred: same log-probabilities) or "raw"
            (the original model). None: processed for what is loaded here and can be, else raw.
        dtype: type of the weights, torch.float32 or for example "bfloat16".
        device: where to put them; None for the CPU.
        revision: branch, tag or commit of a hub model. Local files are pinned by their fingerprint instead.
        tokenizer: the tokenizer of a module in memory.

    Returns:
        The `Model`. Its self-check has passed: attention rows sum to 1, editing `hook_z` moves the logits, the
        residual stream is the sum of what was written to it, processed log-probabilities equal the raw ones.

    Raises:
        UnknownModelError: nothing of that name; the nearest known names are offered.
        UnsafeFileError: pickled weights.
        IntegrityError: a cached file was altered or truncated.
        ModelCheckError: the self-check failed; it names what and by how much.
        ValueError: an option that does not fit the source.

    Cost: for the default model under 3 s of CPU after the imports; memory of the weights, twice while processing.

    Example:
        >>> model = load("smollm2-135m")
        >>> model.n_layers, model.n_heads, model.n_key_value_heads
        (30, 9, 3)
    """
    if weights not in (None, "processed", "raw"):
        raise ValueError(f'weights={weights!r}: use "processed", "raw" or None.')
    precision = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(precision, torch.dtype) and precision.is_floating_point):
        raise ValueError(f'dtype={dtype!r}: use a floating-point type such as "float32" or torch.bfloat16.')
    where = torch.device(device or "cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device="{where}", but this torch ({torch.__version__}) sees no CUDA GPU: use device="cpu".')
    if revision is not None and _is_local(source):
        given = type(source).__name__ if isinstance(source, nn.Module) else source
        raise ValueError(
            f"revision={revision!r} is for hub models; {given} is pinned by its fingerprint: leave it out."
        )
    # Initialising and wrapping a module draw random numbers: the caller's generators must not move.
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        if isinstance(source, nn.Module):
            return _from_memory(source, tokenizer, weights, precision, where)
        return _from_name(os.fspath(source), tokenizer, weights, precision, where, revision)


def _is_local(source: str | os.PathLike[str] | nn.Module) -> bool:
    if isinstance(source, nn.Module):
        return True
    name = os.fspath(source)
    known = name in packaged.catalogue() or Path(name).expanduser().exists()
    return known or not sources.looks_like_hub_name(name)


def _from_name(
    name: str,
    tokenizer: Any,
    weights: Weights | None,
    precision: torch.dtype,
    where: torch.device,
    revision: str | None,
) -> Model:
    if name in packaged.catalogue():
        return _from_package(name, weights, precision, where)
    path = Path(name).expanduser()
    sources.refuse_pickle(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}.")
        module, own = sources.from_gguf(path, precision)
        return _finish(module, own, path.stem, weights, where, fingerprint.of_file(path))
    if path.is_dir():
        module, own = sources.from_folder(path, precision, tokenizer=tokenizer)
        return _finish(module, own, path.name, weights, where, fingerprint.of_folder(path))
    if not sources.looks_like_hub_name(name):
        raise sources.unknown_source(name)
    folder, module, own = sources.from_hub(name, precision, revision)
    return _finish(module, own, name, weights, where, fingerprint.of_folder(folder))


def boot(module: nn.Module, tokenizer: Any, name: str, *, process: bool, centred: bool = False) -> Any:
    """Wrap a Hugging Face module in a TransformerBridge with TransformerLens's hook names.

    Args:
        module: the module; its submodules are replaced by the bridge's.
        tokenizer: its tokenizer.
        name: name for the bridge's config.
        process: fold and centre the weights, in place.
        centred: the weights were processed before they were stored.

    Returns:
        The TransformerBridge, in compatibility mode.
    """
    from transformer_lens.model_bridge import TransformerBridge

    device = next(module.parameters()).device
    dtype = next(module.parameters()).dtype
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=module, tokenizer=_for_bridge(tokenizer), device=device, dtype=dtype
    )
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=not process or centred)
    sources.cast(bridge, dtype)  # folding value biases makes a float32 bias, whatever the rest is
    return bridge.eval()


def _for_bridge(tokenizer: Any) -> Any:
    # The bridge loads the tokenizer a second time, from the folder or the hub, unless it says that it adds BOS; for a
    # tokenizer in memory there is nothing to load. It then looks at what the tokenizer does, not at what it says.
    own = copy.copy(tokenizer)
    own.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": tokenizer.name_or_path, "add_bos_token": True}
    if isinstance(getattr(tokenizer, "_special_tokens_map", None), dict):
        own._special_tokens_map = dict(tokenizer._special_tokens_map)  # the bridge fills in a padding token
    return own


def _from_package(name: str, weights: Weights | None, dtype: torch.dtype, device: torch.device) -> Model:
    if not packaged.is_fetched(name):
        packaged.fetch(name)
    manifest = packaged.checked_manifest(name)
    folder = packaged.folder_of(name)
    stored = folder / "processed"
    if weights == "raw" or not stored.is_dir():
        module, tokenizer = sources.from_folder(folder / "raw", dtype)
        return _finish(module, tokenizer, name, weights, device, manifest["fingerprint"])
    module, tokenizer = sources.from_folder(stored, dtype)
    original, _ = sources.from_folder(folder / "raw", dtype, tokenizer=tokenizer)
    reference = check.reference(original, device)
    bridge = boot(module.to(device), tokenizer, name, process=True, centred=True)
    return _checked(_describe(bridge, tokenizer, name, "processed", manifest["fingerprint"]), reference)


def _from_memory(
    module: nn.Module, tokenizer: Any, weights: Weights | None, dtype: torch.dtype, device: torch.device
) -> Model:
    if hasattr(module, "hook_dict"):  # TransformerBridge or HookedTransformer
        return _from_hooked(module, tokenizer, weights)
    from interp.models.vision import is_vision, load_vision

    name = getattr(getattr(module, "config", None), "_name_or_path", "") or type(module).__name__
    digest = fingerprint.of_module(module, tokenizer)
    copied = sources.cast(copy.deepcopy(module), dtype).eval()
    if is_vision(module):
        if weights == "processed":
            raise ValueError('vision models are not processed: call with weights="raw" or leave it out.')
        return load_vision(copied.to(device), name, fingerprint=digest)
    if tokenizer is None:
        raise ValueError(f"{name} is a module in memory: give its tokenizer too, load(module, tokenizer=tokenizer).")
    if hasattr(copied, "set_attn_implementation"):
        copied.set_attn_implementation("eager")  # the fused kernels have no attention pattern to hook
    return _finish(copied, tokenizer, name, weights, device, digest)


def _from_hooked(bridge: Any, tokenizer: Any, weights: Weights | None) -> Model:
    if not hasattr(bridge, "adapter") and getattr(bridge.cfg, "attention_dir", "causal") != "causal":
        raise ValueError(
            f"a {type(bridge).__name__} attends in both directions, which only a TransformerBridge runs here: "
            "give the Hugging Face model itself, load(module, tokenizer=tokenizer)."
        )
    folded = str(getattr(bridge.cfg, "normalization_type", "")).endswith("Pre")  # HookedTransformer's mark
    found: Weights = "processed" if folded or getattr(bridge, "_weights_processed", False) else "raw"
    if weights is not None and weights != found:
        raise ValueError(
            f"this {type(bridge).__name__} has {found} weights, but weights={weights!r} was asked for. It is used as "
            f'it is: leave `weights` out, or load("{bridge.cfg.model_name}", weights={weights!r}).'
        )
    tokenizer = tokenizer or bridge.tokenizer
    digest = fingerprint.of_module(bridge, tokenizer)
    name = getattr(bridge.cfg, "model_name", None) or type(bridge).__name__
    return _checked(_describe(bridge.eval(), tokenizer, name, found, digest), None)


def _finish(
    module: nn.Module, tokenizer: Any, name: str, weights: Weights | None, device: torch.device, digest: str
) -> Model:
    from interp.models.vision import is_vision, load_vision

    module = module.to(device)
    if is_vision(module):
        return load_vision(module, name, fingerprint=digest)
    headless = type(module).__name__ == "BertModel"
    if headless:
        module = _with_empty_head(module)
    encoder = getattr(module.config, "model_type", "") == "bert"
    if encoder and weights == "processed":
        raise ValueError(
            f"{name} normalises after its residual adds, so its norms cannot be folded: use weights='raw'."
        )
    process = not encoder and weights != "raw"
    reference = None if encoder else check.reference(module, device)
    bridge = boot(module, tokenizer, name, process=process)
    model = _describe(bridge, tokenizer, name, "processed" if process else "raw", digest, headless=headless)
    return _checked(model, reference)


def _with_empty_head(encoder: nn.Module) -> nn.Module:
    # The bridge knows BERT with a language-model head only. This one is never run: d_vocab is 0, and the forward
    # pass ends at the last block.
    from transformers import BertForMaskedLM

    shell = BertForMaskedLM(encoder.config).to(next(encoder.parameters()).device, next(encoder.parameters()).dtype)
    shell.bert = encoder
    shell.set_attn_implementation("eager")
    return shell.eval()


def _describe(
    bridge: Any, tokenizer: Any, name: str, weights: Weights, digest: str, *, headless: bool = False
) -> Model:
    cfg = bridge.cfg
    original = getattr(getattr(bridge, "original_model", None), "config", None)
    causal = getattr(getattr(bridge, "adapter", None), "supports_generation", True)
    return Model(
        bridge=bridge,
        name=name,
        kind="decoder" if causal else "encoder",
        weights=weights,
        fingerprint=digest,
        tokenizer=tokenizer,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        # The bridge misses OPT's name for it.
        d_mlp=0 if getattr(cfg, "attn_only", False) else getattr(original, "ffn_dim", None) or cfg.d_mlp,
        d_vocab=0 if headless else cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        gated_mlp=bool(getattr(cfg, "gated_mlp", False)),
        causal=causal,
    )


def _checked(model: Model, reference: torch.Tensor | None) -> Model:
    check.self_check(model, reference)
    return model
