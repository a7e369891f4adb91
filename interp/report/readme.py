"""Which methods does the README list, and what picture does it show? A table made from the registry, a stored figure.

Run `python -m interp.report.readme` (or `make readme`) after adding a method or running the notebooks again; a test
fails when the README has drifted.
"""

from __future__ import annotations

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


def update(path: str | os.PathLike[str] = "README.md") -> bool:
    """Rewrite both tables of a README between their markers; leave the rest alone.

    Args:
        path: the README, with all four marker lines in it.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: when a pair of markers is not there exactly once, in order; the file is left as it was.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    new = _between(path, text, BEGIN, END, method_table())
    new = _between(path, new, VERDICTS_BEGIN, VERDICTS_END, verdict_table())
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
