"""Do the files around the code say what the code does? Metadata, layering, README, origins of the data."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from interp.core.metrics import logit_diff
from interp.report import readme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "interp"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: A room may import rooms of its own number or lower, itself included; method rooms only `patching` among themselves.
LEVELS = {"models": 0, "core": 1, "tasks": 1, "report": 3, "cli": 4}
METHOD_ROOM = 2
#: May be imported from anywhere, and imports nothing of the package.
LEAF = "interp.core.places"


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for: the dependencies, and those of the extras named."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(text) for texts in lists for text in texts]


def tracked() -> list[Path]:
    """Every file under version control that is there."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


# --- versions and dependencies -------------------------------------------------------------------------------------


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    top = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert top is not None
    assert citation["version"] == PROJECT["version"] == top.group(1) == importlib.metadata.version("interp")


def test_environment_yml_lists_what_pyproject_does():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (by_pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    listed = [Requirement(text) for text in [*plain, *by_pip] if not text.startswith("-")]
    wanted = [*declared("notebooks", "sae", "test"), Requirement("make")]
    wanted.append(Requirement("python" + PROJECT["requires-python"]))
    assert sorted(map(str, listed)) == sorted(map(str, wanted))
    assert [text for text in by_pip if text.startswith("-")] == ["--constraint constraints.txt", "--editable ."]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_constraints_pin_every_dependency_within_its_range(python: str):
    environment = {**default_environment(), "python_version": python, "python_full_version": python + ".0"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    versions: dict[str, str] = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert canonicalize_name(pin.name) not in versions, f"{pin.name} is pinned twice on Python {python}"
        versions[canonicalize_name(pin.name)] = specifier.version
    # pip comes with the virtual environment and tomli with Python 3.10's pytest.
    for requirement in declared("notebooks", "sae", "test"):
        if requirement.name not in ("pip", "tomli"):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_pre_commit_uses_the_pinned_linter():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    used = {pin for hook in hooks for pin in hook.get("additional_dependencies", [])}
    pinned = re.findall(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert used == set(pinned)
    assert len(pinned) == 1


def third_party() -> set[str]:
    """Top-level modules that files of the package import and that are neither its own nor Python's."""
    found = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for name in imports(path)}
    return found - set(sys.stdlib_module_names) - {"interp"}


def test_dependencies_are_what_the_code_imports():
    provides = importlib.metadata.packages_distributions()
    imported = {canonicalize_name(dist) for name in third_party() for dist in provides.get(name, [name])}
    everything = {canonicalize_name(r.name) for r in declared("notebooks", "sae")}
    assert imported <= everything, f"imported but not declared: {imported - everything}"
    # Needed without an import statement: see the comment in pyproject.toml.
    needed = {canonicalize_name(r.name) for r in declared()} - {"accelerate", "gguf", "pip"}
    assert needed <= imported, f"declared but never imported: {needed - imported}"


def test_wheel_carries_data_notebooks_and_templates(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    moved = {"interp": "interp", "data": "interp/_data", "notebooks": "interp/_notebooks"}
    for path in tracked():
        top, *rest = path.relative_to(ROOT).parts
        if top in moved:
            assert "/".join([moved[top], *rest]) in inside
    assert not [name for name in inside if name.startswith(("tests/", "data/", "notebooks/", "benchmarks/"))]


# --- layering ------------------------------------------------------------------------------------------------------


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever the statement stands (`if TYPE_CHECKING` included)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def arrow_is_allowed(source: str, target: str) -> bool:
    """Whether a file of room `source` may import room `target`."""
    level, other = (LEVELS.get(room, METHOD_ROOM) for room in (source, target))
    if source != target and level == other == METHOD_ROOM:
        return target == "patching"
    return other <= level


def arrows() -> dict[tuple[str, str], str]:
    """The import graph of the rooms: (source, target) and one file and name that draws it."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if source == "__init__":
            continue
        for name in imports(path):
            if not name.startswith("interp.") or (name + ".").startswith(LEAF + "."):
                continue
            target = name.split(".")[1]
            if target != source:
                found[source, target] = f"{path.relative_to(ROOT)} imports {name}"
    return found


def test_imports_point_downwards_only():
    graph = arrows()
    wrong = [how for (source, target), how in graph.items() if not arrow_is_allowed(source, target)]
    assert wrong == []
    both_ways = [how for (source, target), how in graph.items() if (target, source) in graph]
    assert both_ways == []
    # The graph was read at all: these two arrows are the design.
    assert ("tasks", "models") in graph
    assert ("report", "core") in graph


def test_the_layering_rule_itself():
    assert arrow_is_allowed("report", "activations")
    assert arrow_is_allowed("activations", "patching")
    assert arrow_is_allowed("tasks", "core")
    assert not arrow_is_allowed("activations", "lenses")
    assert not arrow_is_allowed("patching", "report")
    assert not arrow_is_allowed("models", "core")
    assert not arrow_is_allowed("core", "cli")


def test_the_leaf_imports_nothing_of_the_package():
    path = ROOT / (LEAF.replace(".", "/") + ".py")
    assert not [name for name in imports(path) if name.startswith("interp")]


def test_only_the_models_room_names_transformer_lens():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] == "transformer_lens"
    }
    assert users == {"models"}


def test_import_interp_loads_neither_torch_nor_transformer_lens():
    heavy = "{'torch', 'transformers', 'transformer_lens', 'numpy', 'pandas', 'matplotlib'}"
    code = f"import sys, interp; interp.__version__; print(sorted({heavy} & set(sys.modules)), len(dir(interp)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("]")[0] == "["
    # The face is not empty: what is listed can be had.
    assert int(run.stdout.split("]")[1]) > 5


def test_every_name_of_the_public_face_can_be_had():
    import interp

    missing = [name for name in dir(interp) if getattr(interp, name, None) is None]
    assert missing == []


def test_shapes_are_checked_at_run_time_in_tests():
    # Without the hook of conftest.py this call would broadcast, in silence, to eight wrong numbers.
    with pytest.raises(jaxtyping.TypeCheckError):
        logit_diff(torch.zeros(8, 5), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))


# --- README --------------------------------------------------------------------------------------------------------


def test_readme_method_table_is_the_registry():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = text.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()
    assert written == readme.method_table(), "run `make readme`"
    assert len(written.splitlines()) > 2, "the registry is empty"


def test_readme_verdicts_are_the_stored_notebooks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = text.partition(readme.VERDICTS_BEGIN)[2].partition(readme.VERDICTS_END)[0].strip()
    assert written == readme.verdict_table(), "run `make readme`"
    assert len(written.splitlines()) > 2, "no notebook has stored claims"


def test_readme_speeds_are_the_stored_benchmarks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = text.partition(readme.SPEED_BEGIN)[2].partition(readme.SPEED_END)[0].strip()
    assert written == readme.speed_table(ROOT / "benchmarks" / "results"), "run `make readme`"
    assert len(written.splitlines()) > 2, "no benchmark has stored results"


def test_readme_update_replaces_only_the_table(tmp_path: Path):
    page = tmp_path / "README.md"
    verdicts = f"{readme.VERDICTS_BEGIN}\nold verdicts\n{readme.VERDICTS_END}\n"
    speeds = f"{readme.SPEED_BEGIN}\nold speeds\n{readme.SPEED_END}\n"
    page.write_text(f"# above\n{readme.BEGIN}\nan old table\n{readme.END}\nbelow\n{verdicts}{speeds}", encoding="utf-8")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    row = {
        "case": "a|b, cpu", "value": 12.345, "unit": "times faster", "target": 3.0, "better": "higher", "busy": True,
        "peer_name": "loops", "parity": 1.5e-6, "model": "m",
    }  # fmt: skip
    rows = [row, row | {"case": "a, wall"}, row | {"case": "c", "busy": False, "better": "lower", "parity": None}]
    (results / "some.json").write_text(json.dumps(rows), encoding="utf-8")
    assert readme.update(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# above\n{readme.BEGIN}\n| call |")
    assert f"|\n{readme.END}\nbelow\n{readme.VERDICTS_BEGIN}\n| paper |" in text
    assert "an old table" not in text and "old verdicts" not in text and "old speeds" not in text
    link = "[some](benchmarks/results/some.json)"
    assert f"| {link} | a/b | 12.35 times faster \\* | at least 3 | loops | 2e-06 |\n" in text
    assert f"| {link} | c | 12.35 times faster | at most 3 | loops |  |\n{readme.SPEED_END}" in text
    assert not readme.update(page)


@pytest.mark.parametrize(
    "text",
    [
        "no marker\n",
        f"{readme.BEGIN}\n{readme.END}\n",
        f"{readme.BEGIN}\n",
        f"{readme.END}\n{readme.BEGIN}\n",
        f"{readme.BEGIN}\n{readme.END}\n" * 2,
    ],
)
def test_readme_update_refuses_a_page_without_its_markers(tmp_path: Path, text: str):
    page = tmp_path / "README.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="put them back"):
        readme.update(page)
    assert page.read_text(encoding="utf-8") == text


def same_output(stated: str, printed: str) -> bool:
    """Whether two texts agree: words and integers exactly, other numbers to 1e-4 or one unit of their last digit."""
    number = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\w)")
    if number.sub("#", stated).split() != number.sub("#", printed).split():
        return False
    for one, other in zip(number.findall(stated), number.findall(printed), strict=True):
        # Sums in float32 are ordered differently on other processors: 1e-4 is ten times what 30 layers add up to.
        digits = len(one.partition(".")[2])
        if abs(float(one) - float(other)) > (max(1.001 * 10**-digits, 1e-4 * abs(float(one))) if digits else 0):
            return False
    return True


def test_readme_example_prints_what_it_says(tmp_path: Path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1, "the README has one example, followed by what it prints"
    code, stated = blocks[0]
    assert len(code.strip().splitlines()) <= 10
    assert stated.strip()
    # Another folder and a fresh process, as a reader would have it.
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert same_output(stated, run.stdout), f"the README says\n{stated}\nbut the example prints\n{run.stdout}"


def test_same_output_notices_a_difference():
    assert same_output("mean 3.41 of 30 layers", "mean 3.42 of 30  layers")
    assert not same_output("mean 3.41 of 30 layers", "mean 3.44 of 30 layers")
    assert not same_output("mean 3.41 of 30 layers", "mean 3.41 of 31 layers")
    assert not same_output("mean 3.41 of 30 layers", "mean -3.41 of 30 layers")
    assert not same_output("mean 3.41 of 30 layers", "mean 3.41 of 30 heads")
    assert not same_output("L3 H1", "L3 H2")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_within_the_project_lead_somewhere(page: str):
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    inside = [target for target in targets if "://" not in target]
    assert inside
    assert [target for target in inside if not (ROOT / target).is_file()] == []


def test_the_two_commands_are_what_continuous_integration_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and line[0] not in "#"]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
    for command in ("make reproduce", "make test"):
        assert re.search(rf"^{command} ", text, flags=re.MULTILINE)
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


# --- what a stranger must be able to trust -------------------------------------------------------------------------


def test_every_data_file_has_its_origin_stated():
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", text, flags=re.MULTILINE))
    files = {path.relative_to(ROOT / "data").as_posix() for path in (ROOT / "data").rglob("*") if path.is_file()}
    claims = {name for name in files if re.fullmatch(r"papers/\w+/claims\.csv", name)}
    assert set(rows) == files - claims - {"README.md"}
    assert all(len(origin.split()) >= 3 for origin in rows.values())
    # A claims file names its paper in its own head, where the report reads it.
    for name in claims:
        assert re.search(r"^# paper: arXiv:\d{4}\.\d{4,5}", (ROOT / "data" / name).read_text(encoding="utf-8"), re.M), (
            name
        )


def test_no_tracked_file_names_a_machine():
    # Folders that exist on one machine only, and places to install from that a reader may not have.
    telltale = re.compile(
        r"(?<![\w.~$)}])/(?:home|root|Users|work|tmp|opt|mnt)/\w|[A-Z]:\\Users|(?:extra-)?index-url|find-links|"
        r"https?://[\w.-]*(?:pypi|npmjs|mirror|artifactory|download\.pytorch)[\w.-]*",
    )
    found = []
    for path in tracked():
        if path == Path(__file__).resolve() or path.suffix in (".png", ".pdf"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {hit.group()}" for hit in telltale.finditer(line)]
    assert found == []


def test_tracked_files_are_small():
    # A clone stays light; GitHub shows no notebook above 1 MB either. Figures and stored outputs fit well below it.
    large = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked() if path.stat().st_size > 1e6}
    assert large == {}


def test_readme_picture_is_the_stored_notebooks_figure():
    from interp.report.notebooks import figures_of

    picture = ROOT / "notebooks" / "figures" / "massive_activations.png"
    assert picture.read_bytes() == figures_of(ROOT / "notebooks" / "massive_activations.ipynb")[0].png, (
        "the README's picture has drifted from the notebook: run `make readme`."
    )
