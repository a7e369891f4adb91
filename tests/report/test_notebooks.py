"""Is a notebook run with what was asked, only when something changed, and is nothing lost when it stops?"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from interp.core import places
from interp.report import _inputs, claims, notebooks

PNG = base64.b64encode(b"\x89PNG not really").decode()
PARAMETERS = "model = 'toy'\nn_prompts: int = 2\nfast = False"
CLAIMS = (
    "# title: T\n# paper: arXiv:2402.17762\n"
    "id,statement,where,paper_model,paper_value,tag,quantity,reproduced,partly\n"
    "one,S,W,M,1,code,q,>= 2,\n"
)
#: Counts its runs in a file beside the executed notebook, and checks a claim that hangs on a parameter.
BODY = """
import os, pathlib, sys, types
import interp
from interp.core import places
log = pathlib.Path("runs.txt")
log.write_text((log.read_text() if log.exists() else "") + "run\\n")
places.shipped = lambda name: pathlib.Path(os.environ["PROJECT_FOLDER"]) / name
print("\\r 50%", file=sys.stderr)
print(interp.__file__, "same python:", sys.executable == os.environ["THIS_PYTHON"])
from interp.report import claims
fake = types.SimpleNamespace(provenance={"model": model}, device="cpu")
claims.check("demo", {"one": n_prompts}, model=fake, conditions=f"fast is {fast}")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with data and one notebook, "demo", in place of the shipped ones."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data" / "papers" / "demo").mkdir(parents=True)
    (tmp_path / "data" / "papers" / "demo" / "claims.csv").write_text(CLAIMS, encoding="utf-8")
    save(tmp_path, "demo", BODY)
    monkeypatch.setattr(places, "shipped", lambda name: tmp_path / name)
    monkeypatch.setenv("PROJECT_FOLDER", str(tmp_path))
    monkeypatch.setenv("THIS_PYTHON", sys.executable)
    return tmp_path


def save(project: Path, key: str, *sources: str, parameters: str = PARAMETERS) -> Path:
    """Write a notebook: a heading, the parameters cell, and a code cell of each source."""
    cells = [new_markdown_cell(f"# About {key}"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    notebook = new_notebook(cells=[*cells, *map(new_code_cell, sources)])
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    path = project / "notebooks" / f"{key}.ipynb"
    nbformat.write(notebook, path)
    return path


def run(project: Path, key: str = "demo", **options: Any) -> notebooks.NotebookRun:
    return notebooks.run(key, out=project / "out {of} it", progress=False, **options)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of a kernel, which takes seconds to start: writes the notebook as it is, and lists what it was given."""
    calls: list[dict[str, Any]] = []

    def execute(key: str, notebook: Any, changed: dict, target: Path, progress: bool) -> None:
        calls.append(changed)
        nbformat.write(notebook, target)

    monkeypatch.setattr(notebooks, "_execute", execute)
    return calls


def test_a_notebook_runs_with_its_parameters_and_a_second_run_repeats_nothing(project: Path) -> None:
    first = run(project, n_prompts=3)
    again = run(project, n_prompts=3)
    assert (first.reused, again.reused) == (False, True)
    assert first.parameters == again.parameters == {"model": "toy", "n_prompts": 3, "fast": False}
    assert (first.path.parent / "runs.txt").read_text() == "run\n"  # it worked in the results folder, once
    (checked,) = notebooks.claims_of(first.path)
    assert checked.table["measured"].tolist() == [3.0]
    assert checked.table["verdict"].tolist() == ["reproduced"]
    assert (checked.model["model"], checked.conditions) == ("toy", "fast is False")
    outputs = [output for cell in nbformat.read(first.path, as_version=4).cells for output in cell.get("outputs", ())]
    # This interp in this interpreter; where it lies is not told, and the progress bar is gone.
    assert [o.text for o in outputs if o.output_type == "stream"] == ["<interp>/interp/__init__.py same python: True\n"]
    assert "papermill" not in first.path.read_text(encoding="utf-8")
    record = notebooks.record_of(first.path)
    assert record["parameters"] == dict(first.parameters)
    assert set(record["versions"]) == {"interp", "torch", "transformers", "transformer-lens"}
    with pytest.raises(ValueError, match="own defaults"):
        notebooks.store(first)


def test_a_failed_cell_is_named_and_what_ran_is_kept(project: Path) -> None:
    save(project, "broken", "print('before')", "raise KeyError('the\\nreason')", "print('after')")
    with pytest.raises(notebooks.NotebookError, match=r"'broken' stopped in cell 4 \(In \[4\]\): KeyError") as caught:
        run(project, "broken", n_prompts=7)
    path = project / "out {of} it" / "notebooks" / "broken.ipynb"
    assert str(path) in str(caught.value)
    kept = nbformat.read(path, as_version=4)
    texts = [output.text for cell in kept.cells for output in cell.get("outputs", ()) if "text" in output]
    assert texts == ["before\n"]
    assert notebooks.record_of(path) == {}
    assert notebooks.error_of(path).startswith("cell 4 (In [4]): KeyError")


def test_a_kernel_that_dies_is_said_to_have_died(project: Path) -> None:
    save(project, "killed", "print('before', flush=True)", "import os; os._exit(9)")
    with pytest.raises(
        notebooks.NotebookError, match=r"its kernel died, most often for lack of memory(.|\n)*killed.ipynb"
    ):
        run(project, "killed")
    path = project / "out {of} it" / "notebooks" / "killed.ipynb"
    assert "before" in path.read_text(encoding="utf-8")
    assert notebooks.record_of(path) == {}


def _edit_source(project: Path) -> None:
    save(project, "demo", BODY + "\n1 + 1")


def _edit_data(project: Path) -> None:
    (project / "data" / "papers" / "demo" / "claims.csv").write_text(CLAIMS.replace(">= 2", ">= 3"))


def _new_data(project: Path) -> None:
    (project / "data" / "new.csv").write_text("a\n")


def _lose_output(project: Path) -> None:
    (project / "out {of} it" / "notebooks" / "demo.ipynb").unlink()


def _spoil_record(project: Path) -> None:
    (project / "out {of} it" / "notebooks" / "demo.json").write_text('{"digest": ')


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("change", [_edit_source, _edit_data, _new_data, _lose_output, _spoil_record])
def test_what_can_change_the_outcome_makes_it_run_again(project: Path, change: Callable[[Path], None]) -> None:
    run(project)
    assert run(project).reused
    change(project)
    assert not run(project).reused
    assert run(project).reused


def test_other_parameters_or_versions_or_model_files_make_it_run_again(
    project: Path, kernel: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = project / "model.gguf"
    model.write_bytes(b"GGUF one")
    assert not run(project).reused
    assert not run(project, fast=True).reused
    assert not run(project, model=str(model)).reused
    assert run(project, model=str(model)).reused
    model.write_bytes(b"GGUF two")
    assert not run(project, model=str(model)).reused
    monkeypatch.setattr(_inputs, "versions", lambda: {"torch": "99"})
    assert not run(project, model=str(model)).reused
    # Only what differs from the notebook's own values is injected, so that a default run adds no cell.
    assert kernel[:3] == [{}, {"fast": True}, {"model": str(model)}]


@pytest.mark.usefixtures("kernel")
def test_an_edit_of_the_library_makes_it_run_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = project / "interp" / "core"
    library.mkdir(parents=True)
    (library / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(_inputs, "PACKAGE", library.parent)
    run(project)
    (library / "__pycache__").mkdir()
    (library / "__pycache__" / "code.pyc").write_text("compiled")
    assert run(project).reused
    (library / "code.py").write_text("x = 2\n")
    assert not run(project).reused


@pytest.mark.usefixtures("kernel")
def test_stored_outputs_do_not_make_it_run_again(project: Path) -> None:
    run(project)
    path = project / "notebooks" / "demo.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = [new_output("stream", name="stdout", text="stored")]
    nbformat.write(notebook, path)
    assert run(project).reused


def test_a_model_path_is_seen_from_where_the_caller_is(
    project: Path, kernel: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "mine.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(project)
    run(project, model="mine.gguf")
    assert kernel == [{"model": str(project / "mine.gguf")}]


@pytest.mark.usefixtures("kernel")
def test_a_run_that_fails_takes_back_the_earlier_success(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(project)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "_execute", stop)
    with pytest.raises(KeyboardInterrupt):
        run(project, n_prompts=9)
    assert not (project / "out {of} it" / "notebooks" / "demo.json").exists()


@pytest.mark.usefixtures("project")
def test_unknown_keys_and_parameters_are_answered_with_what_there_is(project: Path) -> None:
    with pytest.raises(ValueError, match="no notebook 'demos'. Nearest: demo"):
        run(project, "demos")
    with pytest.raises(ValueError, match="'demo' has no parameter 'dtype'; it has model, n_prompts, fast"):
        run(project, dtype="bfloat16")
    save(project, "odd", parameters="n_prompts = 2 * 32")
    with pytest.raises(ValueError, match="notebook 'odd': the parameters cell.*'n_prompts = 2 \\* 32'"):
        run(project, "odd")
    assert notebooks.defaults_of("demo") == {"model": "toy", "n_prompts": 2, "fast": False}


def test_a_results_folder_that_cannot_be_made_is_said(project: Path) -> None:
    (project / "file").write_text("")
    with pytest.raises(OSError, match="results folder .* cannot be written"):
        notebooks.run("demo", out=project / "file", progress=False)


def test_only_a_run_with_the_defaults_of_the_notebook_as_it_is_now_is_stored(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(key: str, notebook: Any, changed: dict, target: Path, progress: bool) -> None:
        notebook.cells[2].outputs = [
            new_output("stream", name="stdout", text=f"{Path.home()}/x and {_inputs.PACKAGE}"),
            new_output(
                "execute_result",
                data={"text/plain": "<Axes at 0x7f00aa11bb22>", "image/png": f"abc+{Path.home()}/{PNG}"},
            ),
            new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}),
        ]
        notebook.cells[2].metadata["papermill"] = {"start_time": "2030-01-01"}
        notebook.cells[2].execution_count = 2
        notebook.metadata["papermill"] = {"duration": 1.5}
        nbformat.write(notebook, target)

    monkeypatch.setattr(notebooks, "_execute", execute)
    done = run(project)
    notebooks.store(done)
    stored = nbformat.read(project / "notebooks" / "demo.ipynb", as_version=4)
    nbformat.validate(stored)
    cell = stored.cells[2]
    assert (cell.source, cell.id, cell.execution_count, dict(cell.metadata)) == (BODY, "cell-2", 2, {})
    printed, shown = cell.outputs  # the progress bar is gone
    assert printed.text == "~/x and <interp>/interp"
    assert shown.data == {"text/plain": "<Axes>", "image/png": f"abc+{Path.home()}/{PNG}"}  # base64 is left alone
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert run(project).reused

    save(project, "demo", BODY + "\n2")
    with pytest.raises(ValueError, match="edited after it was run"):
        notebooks.store(done)


def test_figures_carry_the_heading_above_them(project: Path) -> None:
    figure = new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure>"})
    table = new_output("execute_result", data={"text/plain": "a table"})
    cells = [
        new_code_cell("0", outputs=[figure]),
        new_markdown_cell("# Title\n\ntext\n\n## Where they sit ##\nmore"),
        new_code_cell("1", outputs=[table, figure]),
        new_markdown_cell("no heading here, #hashtag"),
        new_code_cell("2", outputs=[figure]),
    ]
    path = project / "figures.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    figures = notebooks.figures_of(path)
    assert [f.caption for f in figures] == ["", "Where they sit", "Where they sit"]
    assert {f.png for f in figures} == {base64.b64decode(PNG)}
    assert notebooks.title_of(path) == "Title"
    assert notebooks.claims_of(path) == []
    assert notebooks.error_of(path) == ""


def test_claims_come_back_from_the_outputs_as_they_went_in(project: Path) -> None:
    row = {c: "x" for c in claims.COLUMNS} | {
        "reproduced": ">= 1",
        "measured": None,
        "verdict": "not testable",
        "why": "w",
    }
    record = {"key": "k", "title": "T", "paper": "p", "model": {}, "conditions": "", "notes": ["n"], "rows": [row]}
    output = new_output("execute_result", data={claims.MIME: record, "text/plain": ""})
    path = project / "claims.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("c", outputs=[output, output])]), path)
    assert [json.loads(json.dumps(c.to_json())) for c in notebooks.claims_of(path)] == [record, record]
