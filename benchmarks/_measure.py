"""How is a benchmark measured? Parity first, then interleaved repeats, medians, and memory in fresh processes."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = Path(__file__).parent / "results"
_VERSIONS = ("torch", "transformers", "transformer-lens", "numpy")


def interleave(
    arms: dict[str, Callable[[], Any]], *, repeats: int = 5, warmups: int = 2
) -> dict[str, dict[str, list[float]]]:
    """Time several functions in one run, in the order A B C C B A, so that drift of the machine meets all alike.

    Args:
        arms: {name: function of no arguments}.
        repeats: measured calls of each.
        warmups: calls of each before that.

    Returns:
        {name: {"cpu": seconds of each call, "wall": likewise}}.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in arms}
    order = list(arms)
    for turn in range(warmups + repeats):
        for name in order if turn % 2 == 0 else reversed(order):
            cpu, wall = time.process_time(), time.perf_counter()
            arms[name]()
            if turn >= warmups:
                times[name]["cpu"].append(time.process_time() - cpu)
                times[name]["wall"].append(time.perf_counter() - wall)
    return times


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script's own sub-command in a process of its own.

    Args:
        script: path of the benchmark.
        arguments: what to measure there.

    Returns:
        The JSON object it printed last, with "cpu_s" of that process added.
    """
    with subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{out}")
    found = json.loads(out.strip().splitlines()[-1]) if out.strip() else {}
    return {**found, "cpu_s": usage.ru_utime + usage.ru_stime}


def peak_mb(function: Callable[[], Any]) -> float:
    """Peak memory of this process while a function runs. Linux only.

    The operating system's own maximum would not do: a child process inherits its parent's, and loading a model may
    need more than what is measured.

    Args:
        function: of no arguments.

    Returns:
        Peak resident memory from the call's start to its end, in MB.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    function()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def median(values: Sequence[float]) -> float:
    """The median, rounded to what a noisy machine can mean.

    Args:
        values: at least one number.

    Returns:
        The median to four significant digits.
    """
    return float(f"{statistics.median(values):.4g}")


def rows_with_origin(rows: list[dict[str, Any]], *, model: str) -> list[dict[str, Any]]:
    """Add to each row what it was measured on.

    Args:
        rows: {case, value, target, better, unit, ours, peer, peer_name, parity}.
        model: the model.

    Returns:
        The rows with model (unless a row names its own), machine, load and versions.
    """
    origin = {
        "model": model,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load_at_start": round(_LOAD, 2),
        "busy": _LOAD > 1.5,
        "versions": {name: version(name) for name in _VERSIONS},
    }
    return [{**origin, **row} for row in rows]


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a table and write `results/<name>.json`.

    Args:
        name: of the benchmark.
        rows: as `rows_with_origin` returned them.
    """
    table = pd.DataFrame(rows)
    met = [row["value"] <= row["target"] if row["better"] == "lower" else row["value"] >= row["target"] for row in rows]
    shown = table[["case", "value", "target", "unit", "ours", "peer", "peer_name", "parity"]].assign(met=met)
    print(shown.to_string(index=False))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


_LOAD = os.getloadavg()[0]
