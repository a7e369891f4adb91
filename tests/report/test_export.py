"""Equal data give equal files; a file is written whole or not at all."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from interp.core.result import Result
from interp.report import export, plots

TOKENS = ["_%&#$\\{}~^", "[CLS]", "a\rb", "\n", 'x"', "NA", "=1+1", " the", "<|end|>"]


def table():
    values = [1234.56789, -0.000012345, 0.5, np.nan, np.inf, -np.inf, 0.0, 1.0, 2.0]
    return Result(
        "lens", pd.DataFrame({"layer": range(9), "token": TOKENS, "value": values}), "nats", meta={"model": "toy"}
    )


def draw():
    table = pd.DataFrame(
        [
            {"prompt": p, "layer": layer, "component": c, "value": np.sin(p + layer) + (c == "b")}
            for p in range(5)
            for layer in range(6)
            for c in "ab"
        ]
    )
    return plots.lines(Result("m", table, "logits"), group="component")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_figures_are_byte_identical_twice_and_in_a_fresh_process(tmp_path):
    ax = draw()
    first = export.save(ax, tmp_path / "a")
    again = export.save(ax, tmp_path / "b")
    new = export.save(draw().get_figure(), tmp_path / "c")
    code = "import runpy, sys; m = runpy.run_path(sys.argv[1]); m['export'].save(m['draw'](), sys.argv[2])"
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", code, __file__, str(tmp_path / "d")], check=True, env=env, cwd=tmp_path)
    assert [p.suffix for p in first] == [".pdf", ".svg", ".png"]
    for path, second, third in zip(first, again, new, strict=True):
        fresh = tmp_path / f"d{path.suffix}"
        assert path.read_bytes() == second.read_bytes() == third.read_bytes() == fresh.read_bytes(), path.suffix


def test_files_carry_no_date_and_no_version(tmp_path):
    pdf, svg, png = (p.read_bytes() for p in export.save(draw(), tmp_path / "a"))
    assert b"CreationDate" not in pdf
    assert b"<dc:date>" not in svg
    assert b"atplotlib v" not in svg
    assert b"Software" not in png


def test_another_figure_gives_other_bytes(tmp_path):
    ax = draw()
    (before,) = export.save(ax, tmp_path / "a.svg")
    ax.set_title("other")
    (after,) = export.save(ax, tmp_path / "b.svg")
    assert before.read_bytes() != after.read_bytes()


def test_global_settings_are_left_alone(tmp_path):
    before = dict(mpl.rcParams)
    export.save(draw(), tmp_path / "a")
    assert dict(mpl.rcParams) == before


def test_tables_are_byte_identical_and_csv_and_json_keep_every_digit(tmp_path):
    paths, again = export.save(table(), tmp_path / "a"), export.save(table(), tmp_path / "b")
    assert [p.name for p in paths] == ["a.csv", "a.tex", "a.json"]
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    read = pd.read_csv(paths[0], dtype={"token": str}, keep_default_na=False, na_values={"value": [""]})
    assert list(read["token"]) == TOKENS
    np.testing.assert_array_equal(read["value"], table().table["value"])
    told = json.loads(paths[2].read_text())
    assert (told["method"], told["unit"], told["meta"]) == ("lens", "nats", {"model": "toy"})
    assert told["columns"] == ["layer", "token", "value"]
    assert [row["token"] for row in told["rows"]] == TOKENS
    assert [row["value"] for row in told["rows"][:6]] == [1234.56789, -0.000012345, 0.5, None, "Infinity", "-Infinity"]


def test_latex_is_a_booktabs_table_with_everything_escaped(tmp_path):
    (path,) = export.save(table(), tmp_path / "a.tex")
    lines = path.read_text().splitlines()
    assert lines[:3] == [r"\begin{tabular}{rlr}", r"\toprule", r"layer & token & value (nats) \\"]
    assert lines[4] == r"0 & \_\%\&\#\$\textbackslash{}\{\}\textasciitilde{}\textasciicircum{} & 1235 \\"
    assert lines[5] == r"1 & {[}CLS] & $-1.234$ $\times 10^{-5}$ \\"
    assert lines[6] == r"2 & a\textbackslash{}rb & 0.5000 \\"
    assert lines[7].endswith(r" & {--} \\")
    assert lines[8].endswith(r" & $\infty$ \\")
    assert lines[11].startswith(r"7 & \textperiodcentered{}the & 1.000")
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_latex_headers_are_escaped_and_digits_are_the_ones_asked_for(tmp_path):
    frame = pd.DataFrame({"50% & more": [0.123456], "n": [-3], "ok": [True]})
    (path,) = export.save(frame, tmp_path / "a.tex", digits=2)
    lines = path.read_text().splitlines()
    assert lines[2] == r"50\% \& more & n & ok \\"
    assert lines[4] == r"0.12 & $-3$ & yes \\"


def test_a_grid_keeps_its_index(tmp_path):
    result = Result("m", pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "value": [1.0, 2, 3, 4]}), "nats")
    (path,) = export.save(result.grid("layer", "head"), tmp_path / "a.csv")
    assert path.read_text() == '"layer",0,1\n0,1.0,2.0\n1,3.0,4.0\n'


def test_formats_come_from_the_ending_or_from_the_caller(tmp_path):
    names = lambda *a, **k: [p.name for p in export.save(table(), *a, **k)]  # noqa: E731
    assert names(tmp_path / "a.csv") == ["a.csv"]
    assert names(tmp_path / "a.csv", formats=["tex"]) == ["a.tex"]
    assert names(tmp_path / "layer0.5", formats=["json"]) == ["layer0.5.json"]


def test_an_unknown_or_unfit_format_names_those_that_fit(tmp_path):
    with pytest.raises(ValueError, match=r"'docx'.*Result.*csv, tex, json"):
        export.save(table(), tmp_path / "a.docx")
    with pytest.raises(ValueError, match=r"'csv'.*Axes.*pdf, svg, png"):
        export.save(draw(), tmp_path / "a.csv")
    with pytest.raises(TypeError, match="list.*Axes or a Figure, a Result, a DataFrame, or a Circuit"):
        export._writers([1], digits=4)  # `save` itself is type-checked in tests, and would not get this far
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_and_a_file_in_its_place_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.a\.csv was not written \(No such file.*still in memory"):
        export.save(table(), tmp_path / "nowhere" / "a.csv")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="still in memory"):
        export.save(table(), tmp_path / "file" / "a.csv")


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_full_disk_leaves_the_old_file_whole_and_no_part(tmp_path, monkeypatch, where):
    target = tmp_path / "a.csv"
    target.write_text("old")

    def full_write(self, content):
        with open(self, "wb") as half:
            half.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_replace(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "write":
        monkeypatch.setattr(Path, "write_bytes", full_write)
    else:
        monkeypatch.setattr(os, "replace", full_replace)
    with pytest.raises(OSError, match=r"a\.csv was not written \(No space left.*still in memory") as caught:
        export.save(table(), target)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert target.read_text() == "old"


def test_ctrl_c_leaves_no_part(tmp_path, monkeypatch):
    def interrupted(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.save(table(), tmp_path / "a.csv")
    assert list(tmp_path.iterdir()) == []
