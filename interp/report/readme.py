"""Which tables does the README have, and what picture? The registry's methods, the notebooks' verdicts, the benchmarks.

Run `python -m interp.report.readme` (or `make readme`) after adding a method or running the notebooks again; a test
fails when the README has drifted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from interp.core.places import shipped
from interp.core.registry import MethodInfo, methods
from interp.report.claims import VERDICTS
from interp.report.notebooks import available, claims_of, figures_of

BEGIN = "<!-- methods: begin (written by `make readme`) -->"
END = "<!-- methods: end -->"
VERDICTS_BEGIN = "<!-- verdicts: begin (written by `make readme`) -->"
VERDICTS_END = "<!-- verdicts: end -->"
SPEED_BEGIN = "<!-- speed: begin (written by `make readme`) -->"
SPEED_END = "<!-- speed: end -->"


def method_table() -> str:
    """The table of every registered method.

    Returns:
        A Markdown table, one row a method in order of import path: call, what it answers, paper, notebook.
    """
    head = "| call | question | paper | notebook |\n| --- | --- | --- | --- |"
    return "\n".join([head, *map(_row, methods())])


def verdict_table() -> str:
    """What reproduced, by the outputs stored in the notebooks.

    Returns:
        A Markdown table, one row a paper: how many of its claims got each verdict, on which model.
    """
    lines = [
        "| paper | model | reproduced | partly | not reproduced | not testable |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key in available():
        for claims in claims_of(shipped("notebooks") / f"{key}.ipynb"):
            counts = [str(claims.counts[verdict]) for verdict in VERDICTS]
            title = f"[{claims.title}](notebooks/{key}.ipynb)"
            lines.append(f"| {title} | {claims.model['model']} | {' | '.join(counts)} |")
    return "\n".join(lines)


def speed_table(folder: str | os.PathLike[str] = "benchmarks/results") -> str:
    """What the benchmarks measured: CPU time, arithmetic and memory, by the rows stored in their results.

    Args:
        folder: of the JSON files; those of a GPU, named `<benchmark>_<gpu>.json`, are left out.

    Returns:
        A Markdown table, one row a case: its file, the number beside its target, what it is compared with, and the
        largest difference of the two outcomes. Cases of a busy machine are marked with an asterisk.
    """
    lines = [
        "| benchmark | case | measured | target | against | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for file in sorted(Path(folder).glob("*.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))
        models = {row["model"] for row in rows}
        for row in rows:
            if "wall" in row["case"].split(", ")[-1]:
                continue
            case = row["case"].removesuffix(", cpu") + (f" ({row['model']})" if len(models) > 1 else "")
            bound = ("at least" if row["better"] == "higher" else "at most") + f" {row['target']:g}"
            value = f"{row['value']:.4g} {row['unit']}" + (" \\*" if row["busy"] else "")
            gap = "" if row.get("parity") is None else f"{row['parity']:.0e}"
            cells = (f"[{file.stem}](benchmarks/results/{file.name})", case, value, bound, row["peer_name"] or "", gap)
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def update(path: str | os.PathLike[str] = "README.md") -> bool:
    """Rewrite the tables of a README between their markers; leave the rest alone.

    Args:
        path: the README, with all six marker lines in it; the results of the benchmarks lie beside it.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: when a pair of markers is not there exactly once, in order; the file is left as it was.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    new = _between(path, text, BEGIN, END, method_table())
    new = _between(path, new, VERDICTS_BEGIN, VERDICTS_END, verdict_table())
    new = _between(path, new, SPEED_BEGIN, SPEED_END, speed_table(path.parent / "benchmarks" / "results"))
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def _between(path: Path, text: str, first: str, last: str, table: str) -> str:
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in rest or last in before + after:
        raise ValueError(f"{path} needs one line {first!r} and, below it, one line {last!r}: put them back.")
    return f"{before}{first}\n{table}\n{last}{after}"


def update_picture(path: str | os.PathLike[str] = "notebooks/figures/massive_activations.png") -> bool:
    """Rewrite the README's picture: the first figure of the stored notebook of the same name.

    Args:
        path: the picture.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: when the notebook has no stored figure.
    """
    path = Path(path)
    notebook = path.parent.parent / f"{path.stem}.ipynb"
    figures = figures_of(notebook)
    if not figures:
        raise ValueError(f"{notebook} has no stored figure: run `make notebooks` first.")
    old = path.read_bytes() if path.is_file() else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figures[0].png)
    return old != figures[0].png


def _row(info: MethodInfo) -> str:
    paper = info.paper
    if paper.startswith("arXiv:"):
        paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    # A pipe would end the cell.
    summary = info.summary.replace("|", "\\|")
    return f"| `{info.path}` | {summary} | {paper} | [{info.notebook}](notebooks/{info.notebook}.ipynb) |"


if __name__ == "__main__":
    update()
    update_picture()
