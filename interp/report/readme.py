"""Which methods does the README list? The table between its markers, made from the registry.

Run `python -m interp.report.readme` (or `make readme`) after adding a method; a test fails when the table has drifted.
"""

from __future__ import annotations

import os
from pathlib import Path

from interp.core.registry import MethodInfo, methods

BEGIN = "<!-- methods: begin (written by `make readme`) -->"
END = "<!-- methods: end -->"


def method_table() -> str:
    """The table of every registered method.

    Returns:
        A Markdown table, one row a method in order of import path: call, what it answers, paper, notebook.
    """
    head = "| call | question | paper | notebook |\n| --- | --- | --- | --- |"
    return "\n".join([head, *map(_row, methods())])


def update(path: str | os.PathLike[str] = "README.md") -> bool:
    """Rewrite the table between the markers of a README; leave the rest alone.

    Args:
        path: the README, with both marker lines in it.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: when the markers are not there exactly once, in order; the file is left as it was.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path} needs one line {BEGIN!r} and, below it, one line {END!r}: put them back.")
    new = f"{before}{BEGIN}\n{method_table()}\n{END}{after}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def _row(info: MethodInfo) -> str:
    paper = info.paper
    if paper.startswith("arXiv:"):
        paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    # A pipe would end the cell.
    summary = info.summary.replace("|", "\\|")
    return f"| `{info.path}` | {summary} | {paper} | [{info.notebook}](notebooks/{info.notebook}.ipynb) |"


if __name__ == "__main__":
    update()
