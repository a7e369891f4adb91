"""Which claims of which papers reproduced, on one page that needs nothing else?"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from interp.report import _tidy, notebooks
from interp.report._templates import render
from interp.report.claims import VERDICTS, Claims

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}(?:v\d+)?)")

_NAMES = {"model_fingerprint": "fingerprint"}
#: Facts that belong at the top of the page when all notebooks agree on them.
_SHARED = ("model", "fingerprint", "weights", "dtype", "device", "versions", "commit")


@dataclass(frozen=True)
class Chapter:
    """One executed notebook, as the page shows it.

    Attributes:
        key: stem of the notebook's file name.
        title: the paper's title, else the notebook's first heading.
        link: address of the executed notebook, relative to the page.
        claims: what it checked.
        figures: (caption, PNG as base64).
        pages: (caption, address) of pages to look through, relative to the page.
        facts: how it was run: {what: value}.
        problem: why it is no complete result; "" when it is.
    """

    key: str
    title: str
    link: str
    claims: list[Claims]
    figures: list[tuple[str, str]]
    pages: list[tuple[str, str]]
    facts: dict[str, str]
    problem: str


def write(out: str | os.PathLike[str] = "results") -> Path:
    """Write the report on all notebooks executed so far.

    The page holds its figures and style in itself, loads nothing, and names no time: equal results give an equal page.
    Views to look through (the atlas of heads, circuits) are pages beside it, in `<out>/pages`, which need scripts.

    Args:
        out: results folder; the executed notebooks are read from `<out>/notebooks`.

    Returns:
        Path of `<out>/index.html`.

    Raises:
        FileNotFoundError: when there is no executed notebook.
        OSError: when the page cannot be written.

    Cost: a second or two.
    """
    folder = Path(out).expanduser()
    paths = sorted((folder / "notebooks").glob("*.ipynb"))
    if not paths:
        raise FileNotFoundError(
            f"{folder / 'notebooks'} holds no executed notebook. Run first: interp reproduce --out {out}"
        )
    chapters = [_chapter(path) for path in paths]
    shared = _shared(chapters)
    page = folder / "index.html"
    text = render(
        "report.html.j2",
        chapters=chapters,
        shared=shared,
        verdicts=VERDICTS,
        totals={verdict: sum(c.counts[verdict] for ch in chapters for c in ch.claims) for verdict in VERDICTS},
        arxiv=_arxiv,
    )
    _tidy.replace_text(page, text)
    return page


def _chapter(path: Path) -> Chapter:
    record = notebooks.record_of(path)
    claims = notebooks.claims_of(path)
    problem = ""
    if not record:
        failed = notebooks.error_of(path)
        problem = f"This notebook did not run to its end{': ' + failed if failed else ''}. What is below is incomplete."
    elif record.get("parameters", {}).get("fast") is True:
        problem = "Fast mode: a small sample, to see that everything runs. These numbers are not to be cited."
    return Chapter(
        key=path.stem,
        title=claims[0].title if claims else notebooks.title_of(path),
        link=quote(f"notebooks/{path.name}"),
        claims=claims,
        figures=[(f.caption, base64.b64encode(f.png).decode("ascii")) for f in notebooks.figures_of(path)],
        pages=_pages(path),
        facts=_facts(claims, record),
        problem=problem,
    )


def _pages(path: Path) -> list[tuple[str, str]]:
    """Write the pages that a notebook shows beside the report, and say where they are."""
    links: list[tuple[str, str]] = []
    for number, page in enumerate(notebooks.pages_of(path), 1):
        (path.parent.parent / "pages").mkdir(exist_ok=True)
        name = f"{path.stem}-{number}.html"
        _tidy.replace_text(path.parent.parent / "pages" / name, page.html)
        links.append((page.caption, quote(f"pages/{name}")))
    return links


def _facts(claims: list[Claims], record: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for checked in claims:
        for name, value in {**checked.model, "conditions": checked.conditions}.items():
            found.setdefault(_NAMES.get(name, name), []).append(value)
    others = {name: value for name, value in record.get("parameters", {}).items() if name not in found}
    if not claims:  # what was measured says itself on which model; a notebook without claims was asked for one
        found |= {name: [str(others.pop(name))] for name in ("model", "device", "dtype") if name in others}
    found["parameters"] = [", ".join(f"{name} {value}" for name, value in others.items())]
    if record.get("versions"):
        found["versions"] = [", ".join(f"{name} {version}" for name, version in record["versions"].items())]
    found["commit"] = [record.get("commit", "")]
    facts = {name: " / ".join(dict.fromkeys(filter(None, values))) for name, values in found.items()}
    return {name: value for name, value in facts.items() if value}


def _shared(chapters: list[Chapter]) -> dict[str, str]:
    """What the top of the page says once for all notebooks: the facts of `_SHARED` on which they agree."""
    found = {name: {ch.facts[name] for ch in chapters if name in ch.facts} for name in _SHARED}
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def _arxiv(paper: str) -> str:
    found = _ARXIV.fullmatch(paper)
    return f"https://arxiv.org/abs/{found[1]}" if found else ""
