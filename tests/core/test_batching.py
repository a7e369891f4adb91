"""Does stopped work go on where it stopped, and give what it would have given?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp.core.batching import batches, sweep

N, SIZE = 10, 3
IDENTITY = {"method": "squares", "seed": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    return tmp_path


class Squares:
    """Squares of the row numbers, that can be stopped before a row, and count the batches they computed."""

    def __init__(self, stop_at: int | None = None, with_what: type[BaseException] = RuntimeError) -> None:
        self.computed: list[int] = []
        self.stop_at, self.with_what = stop_at, with_what

    def __call__(self, rows: slice) -> Mapping[str, np.ndarray]:
        if self.stop_at is not None and rows.start >= self.stop_at:
            raise self.with_what("stopped")
        self.computed.append(rows.start)
        numbers = np.arange(rows.start, rows.stop)
        return {
            "squares": numbers**2,
            "name": np.array([f"row {i}" for i in numbers]),
            "grid": np.outer(numbers, [1, 2]),
        }


def squares(compute: Callable[[slice], Mapping[str, np.ndarray]], **changed: object) -> dict[str, np.ndarray]:
    options = {"n": N, "batch_size": SIZE, "identity": IDENTITY, "description": "squares", **changed}
    return sweep(options.pop("n"), compute, **options)  # type: ignore[arg-type]


def check(found: Mapping[str, np.ndarray]) -> None:
    assert found["squares"].tolist() == [i * i for i in range(N)]
    assert found["name"].tolist() == [f"row {i}" for i in range(N)]
    assert found["grid"].shape == (N, 2)


def stored(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.npz"))


@pytest.mark.parametrize(("n", "size"), [(10, 3), (9, 3), (2, 5), (1, 1), (0, 4)])
def test_batches_cover_each_row_once(n: int, size: int) -> None:
    spans = list(batches(n, size))
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(n))
    assert all(0 < span.stop - span.start <= size for span in spans)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0: a batch needs at least one row"):
        squares(Squares(), batch_size=0)
    with pytest.raises(ValueError, match=r"squares: there is nothing to compute \(n=0\); give at least one prompt"):
        squares(Squares(), n=0)


def test_batched_equals_at_once_and_nothing_stays_behind(cache: Path) -> None:
    check(squares(Squares()))
    check(squares(Squares(), batch_size=1))
    check(squares(Squares(), batch_size=N))
    assert stored(cache) == []
    assert list(cache.rglob("*.tmp")) == []


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt], ids=["exception", "Ctrl-C"])
def test_finished_batches_survive_a_stop(stop: type[BaseException], cache: Path) -> None:
    with pytest.raises(stop):
        squares(Squares(stop_at=6, with_what=stop))
    assert [file.name for file in stored(cache)] == ["0.npz", "1.npz"]
    second = Squares()
    check(squares(second))
    assert second.computed == [6, 9]
    assert stored(cache) == []  # done: the next run starts afresh
    third = Squares()
    check(squares(third))
    assert third.computed == [0, 3, 6, 9]


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": {**IDENTITY, "seed": 1}},
        {"identity": {**IDENTITY, "n": N}},
        {"identity": {}},
        {"batch_size": 2},
        {"n": N + 1},
    ],
    ids=["another option", "an option called n", "no options", "another batch size", "more rows"],
)
def test_another_study_reuses_nothing(changed: dict[str, object]) -> None:
    with pytest.raises(RuntimeError):
        squares(Squares(stop_at=6))
    other = Squares()
    squares(other, **changed)
    assert other.computed[0] == 0
    assert sum(1 for _ in other.computed) == len(list(batches(changed.get("n", N), changed.get("batch_size", SIZE))))
    resumed = Squares()
    check(squares(resumed))  # and the first one's batches are still there
    assert resumed.computed == [6, 9]


def test_batches_of_another_version_are_not_mixed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        squares(Squares(stop_at=6))
    monkeypatch.setattr("interp.core.batching.version", lambda name: "another")
    other = Squares()
    check(squares(other))
    assert other.computed == [0, 3, 6, 9]


def test_options_named_like_the_sweeps_own_count() -> None:
    with pytest.raises(RuntimeError):
        squares(Squares(stop_at=6), identity={"n": 1})
    other = Squares()
    squares(other, identity={"n": 2})
    assert other.computed == [0, 3, 6, 9]


@pytest.mark.parametrize("damage", ["truncated", "empty", "altered", "text", "a folder"])
def test_a_damaged_batch_is_computed_again(damage: str, cache: Path) -> None:
    with pytest.raises(RuntimeError):
        squares(Squares(stop_at=6))
    first = stored(cache)[0]
    whole = first.read_bytes()
    middle = whole.index(b"NUMPY") + 90  # inside the first array's header, which a checksum covers
    broken = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "altered": whole[:middle] + b"\xff" + whole[middle + 1 :],
        "text": b"not an archive",
    }
    if damage == "a folder":
        first.unlink()
        first.mkdir()
        with pytest.warns(UserWarning, match="cannot be written"):
            resumed = Squares()
            check(squares(resumed))
    else:
        first.write_bytes(broken[damage])
        resumed = Squares()
        check(squares(resumed))
    assert resumed.computed == [0, 6, 9]


def test_a_half_written_file_is_not_a_batch(cache: Path) -> None:
    with pytest.raises(RuntimeError):
        squares(Squares(stop_at=6))
    second = stored(cache)[1]
    half = second.with_suffix(".4711.tmp")
    half.write_bytes(second.read_bytes()[:100])
    second.unlink()
    resumed = Squares()
    check(squares(resumed))
    assert resumed.computed == [3, 6, 9]
    assert not half.exists()


def test_a_cache_that_cannot_be_written_costs_the_resume_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Under a file, because a superuser may write where others may not.
    (cache / "file").write_text("x")
    monkeypatch.setenv("INTERP_CACHE", str(cache / "file"))
    with pytest.warns(UserWarning, match=r"cannot be written .*cannot be resumed.* Set INTERP_CACHE"):
        check(squares(Squares()))


def test_a_full_disk_costs_the_resume_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(stream: object, **arrays: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        check(squares(Squares()))
    with pytest.warns(UserWarning, match="No space left on device"), pytest.raises(RuntimeError):
        squares(Squares(stop_at=6))
    assert [file for file in cache.rglob("*") if file.is_file()] == []  # no half file fills the disk further


def test_a_stop_while_a_batch_is_written_leaves_no_half_batch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(stream: Any, **arrays: np.ndarray) -> None:
        stream.write(b"PK half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(np, "savez", interrupted)
        squares(Squares())
    assert stored(cache) == []
    check(squares(Squares()))


def test_python_objects_are_not_stored() -> None:
    with pytest.raises(ValueError, match="squares: array 'a' holds Python objects"):
        squares(lambda rows: {"a": np.array([{}] * (rows.stop - rows.start))})


def test_a_single_batch_touches_no_disk(cache: Path) -> None:
    squares(Squares(), n=3)
    assert list(cache.iterdir()) == []


def test_killed_in_the_middle_it_goes_on_and_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, sys
            from pathlib import Path
            import numpy as np
            from interp.core.batching import sweep

            log, last = Path(sys.argv[1]), int(sys.argv[2])

            def compute(rows):
                with log.open("a") as stream:
                    stream.write(f"{rows.start}\\n")
                if rows.start == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                rng = np.random.default_rng(rows.start)
                return {"a": rng.normal(size=(rows.stop - rows.start, 4)).astype("float32")}

            found = sweep(20, compute, batch_size=4, identity={"what": "killed"}, description="killed")
            np.save(sys.argv[3], found["a"])
        """)
    )

    def study(cache: str, log: str, killed_at: int) -> int:
        arguments = [str(tmp_path / log), str(killed_at), str(tmp_path / f"{log}.npy")]
        environment = {**os.environ, "INTERP_CACHE": str(tmp_path / cache)}
        folder = Path(__file__).resolve().parents[2]
        environment["PYTHONPATH"] = str(folder)
        done = subprocess.run(
            [sys.executable, str(script), *arguments], env=environment, capture_output=True, check=False
        )
        return done.returncode

    assert study("one", "killed", 12) == -signal.SIGKILL
    assert not (tmp_path / "killed.npy").exists()
    assert study("one", "resumed", -1) == 0
    assert study("two", "whole", -1) == 0
    rows = {log: [int(line) for line in (tmp_path / log).read_text().split()] for log in ("killed", "resumed", "whole")}
    assert rows == {"killed": [0, 4, 8, 12], "resumed": [12, 16], "whole": [0, 4, 8, 12, 16]}
    np.testing.assert_array_equal(np.load(tmp_path / "resumed.npy"), np.load(tmp_path / "whole.npy"), strict=True)
