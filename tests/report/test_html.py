"""Does the page say what was measured, need nothing else, and let nothing in it act?"""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from interp.circuits import Circuit, Graph
from interp.core import places
from interp.models import Model, toy
from interp.report import atlas, circuit, claims, html
from interp.tasks import Relation, Relations
from interp.weights import maps

EVIL = "<script>alert('x')</script>"
FIGURE = b"\x89PNG figure"
VERSIONS = {"interp": "0.1.0", "torch": "2.13.0"}


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attrs[name] for element, attrs in self.elements if element == tag and name in attrs]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder, and claims files of two papers in place of the shipped ones."""
    monkeypatch.setattr(places, "shipped", lambda name: tmp_path / name)
    write_claims(tmp_path, "big", "Big Entries", "arXiv:2402.17762", "A few entries are large")
    write_claims(tmp_path, "other", f"Other {EVIL}", "javascript:alert(1)", f"Statement {EVIL}")
    (tmp_path / "results" / "notebooks").mkdir(parents=True)
    return tmp_path / "results"


def write_claims(project: Path, key: str, title: str, paper: str, statement: str) -> None:
    folder = project / "data" / "papers" / key
    folder.mkdir(parents=True)
    lines = [
        f"# title: {title}",
        f"# paper: {paper}",
        "# tag code: read in the repository",
        ",".join(claims.COLUMNS),
        f"size,{statement},Sec. 2,LLaMA2-7B,2622,code,largest over median,>= 1000,>= 300",
        "gone,It can be removed,Table 3,LLaMA2-7B,5.47,3p,perplexity ratio,<= 1.05,",
    ]
    (folder / "claims.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def add(out: Path, key: str, model: str = "toy", *, finished: bool = True, fast: bool = False, **measured: Any) -> None:
    """Put an executed notebook into the results folder, as the runner would leave it."""
    cells = [
        new_markdown_cell(f"# Notebook {key}\n\n## The largest entries"),
        new_code_cell("plot", outputs=[new_output("display_data", data={"image/png": encoded(FIGURE)})]),
    ]
    if measured:
        provenance = {"model": model, "model_fingerprint": "ab" * 32}
        got = claims.check(
            key, measured, model=SimpleNamespace(provenance=provenance, device="cpu"), conditions="64 prompts"
        )
        cells.append(new_code_cell("check", outputs=[new_output("execute_result", data=got._repr_mimebundle_())]))
    nbformat.write(new_notebook(cells=cells), out / "notebooks" / f"{key}.ipynb")
    if finished:
        record = {"digest": "d", "parameters": {"fast": fast, "seed": 0}, "versions": VERSIONS, "commit": "c0ffee"}
        (out / "notebooks" / f"{key}.json").write_text(json.dumps(record))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_every_claim_is_shown_with_all_that_is_known_of_it(out: Path) -> None:
    add(out, "big", size=500.25, gone=claims.untestable("no such layer"))
    path = html.write(out)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == out / "index.html"
    for part in (
        "A few entries are large", "size · Sec. 2", "2622", "LLaMA2-7B [code]", "5.47", "[3p]", "500.2",
        "largest over median",
        ">= 1000", "partly: >= 300", "partly 500.2 misses >= 1000 but meets >= 300", "not testable no such layer",
        "64 prompts", "Big Entries", "tag code: read in the repository", "The largest entries",
        "model toy", "fingerprint " + "ab" * 32, "versions interp 0.1.0, torch 2.13.0", "commit c0ffee",
        "parameters fast False, seed 0",
    ):  # fmt: skip
        assert part in page.text, part
    assert "All 0 1 0 1" in page.text  # reproduced, partly, not reproduced, not testable
    assert page.attributes("img", "src") == ["data:image/png;base64," + encoded(FIGURE)]
    links = page.attributes("a", "href")
    assert "notebooks/big.ipynb" in links
    assert "https://arxiv.org/abs/2402.17762" in links
    # The overview leads to each claim, and each leads somewhere.
    targets = page.attributes("tr", "id") + page.attributes("article", "id")
    inside = [link for link in links if link and link.startswith("#")]
    assert {"#big.size", "#big.gone", "#paper.big"} == set(inside)
    assert {link[1:] for link in inside} <= set(targets)


def test_views_of_a_notebook_are_pages_beside_the_report(out: Path) -> None:
    add(out, "big", size=5000, gone=1)
    scores = maps.relation_scores(*_model_and_pairs())
    edges = circuit.view(Circuit.from_edges(Graph(1, 2, 2), [("input", "m0"), ("m0", "logits")]))
    views = [atlas.atlas_html(scores), edges]
    notebook = nbformat.read(out / "notebooks" / "big.ipynb", as_version=4)
    for view in [*views, SimpleNamespace(_repr_html_=lambda: "<p>a table</p>")]:
        shown = {"text/html": view._repr_html_()}
        notebook.cells.append(new_code_cell("view", outputs=[new_output("execute_result", data=shown)]))
    nbformat.write(notebook, out / "notebooks" / "big.ipynb")
    links = Page(html.write(out).read_text(encoding="utf-8")).attributes("a", "href")
    assert [link for link in links if link and link.startswith("pages/")] == ["pages/big-1.html", "pages/big-2.html"]
    assert (out / "pages" / "big-1.html").read_text(encoding="utf-8") == str(views[0])  # unescaped to the last letter
    edges.save(out / "alone.html")
    assert (out / "pages" / "big-2.html").read_text(encoding="utf-8") == (out / "alone.html").read_text(
        encoding="utf-8"
    )
    assert not (out / "pages" / "big-3.html").exists()


def _model_and_pairs() -> tuple[Model, Relations]:
    model = toy.random("llama", weights="raw")
    return model, Relations((Relation.from_pairs(model, 'copy "<i>"', [(f"w{i}", f"w{i}") for i in range(2, 40)]),))


def test_text_from_outside_stays_text(out: Path) -> None:
    add(out, "other", f"model {EVIL}\u202e", size=1, gone=claims.untestable(f"because {EVIL}"))
    notebook = nbformat.read(out / "notebooks" / "other.ipynb", as_version=4)
    notebook.cells[0].source = f'# x"><img src=x onerror=alert(1)> {EVIL}'
    nbformat.write(notebook, out / "notebooks" / "other.ipynb")
    text = html.write(out).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.attributes("img", "src") == ["data:image/png;base64," + encoded(FIGURE)]
    assert page.text.count(EVIL) >= 5  # title, statement, model, reason and caption are all there to read
    assert not [link for link in page.attributes("a", "href") if link and link.startswith("javascript")]
    assert "\u202e" not in text  # a bidirectional override would reorder what follows it


def test_the_page_loads_nothing_and_runs_nothing(out: Path) -> None:
    add(out, "big", size=5000, gone=1)
    text = html.write(out).read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert not page.attributes("img", "srcset")
    assert all(source and source.startswith("data:") for source in page.attributes("img", "src"))
    assert "@import" not in text
    assert "url(" not in text
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attrs.get("content")) for tag, attrs in page.elements
    ]


def test_equal_results_give_an_equal_page(out: Path) -> None:
    add(out, "big", size=5000, gone=1)
    first = html.write(out).read_bytes()
    assert html.write(out).read_bytes() == first
    assert not re.search(rb"\b20\d\d-\d\d-\d\d\b|\d\d:\d\d:\d\d", first)


def test_what_is_no_complete_result_says_so(out: Path) -> None:
    add(out, "big", size=5000, gone=1)
    assert "did not run to its end" not in Page(html.write(out).read_text(encoding="utf-8")).text
    add(out, "big", fast=True, size=5000, gone=1)
    assert "Fast mode: a small sample" in Page(html.write(out).read_text(encoding="utf-8")).text
    add(out, "stopped", finished=False)
    notebook = nbformat.read(out / "notebooks" / "stopped.ipynb", as_version=4)
    failure = new_output("error", ename="KeyError", evalue="'why'", traceback=[])
    notebook.cells.append(new_code_cell("fail", outputs=[failure], execution_count=5))
    nbformat.write(notebook, out / "notebooks" / "stopped.ipynb")
    text = Page(html.write(out).read_text(encoding="utf-8")).text
    assert "did not run to its end: cell 3 (In [5]): KeyError: 'why'." in text
    assert "Notebook stopped (see the note there) no claims checked" in text


def test_what_papers_do_not_share_is_said_paper_by_paper(out: Path) -> None:
    add(out, "big", "gpt2", size=5000, gone=1)
    add(out, "other", "pythia-160m", size=5000, gone=1)
    text = Page(html.write(out).read_text(encoding="utf-8")).text
    top, first, second = re.split("executed notebook", text)
    assert "versions interp" in top
    assert "versions interp" not in first + second
    assert "model gpt2" not in top
    assert ("model gpt2" in first, "model pythia-160m" in second) == (True, True)


def test_without_executed_notebooks_it_says_what_to_run(out: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Run first: interp reproduce"):
        html.write(out)
