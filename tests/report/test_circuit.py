"""The picture shows every edge once, as what it is, and the page can be read, reached by keys and trusted."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

from interp.circuits.circuit import Circuit
from interp.circuits.graph import Graph
from interp.circuits.network import to_networkx
from interp.core.result import Result
from interp.report import export
from interp.report.circuit import _KINDS, draw, view

GRAPH = Graph(4, 4, 2)
HOSTILE = ["</script><script>x=1</script>", "<img src=x onerror=x()>", "&lt;", " a", "\n", "\u202eabc"]


@pytest.fixture
def circuit():
    scores = np.random.default_rng(0).normal(size=GRAPH.possible.shape)
    return Circuit.of(GRAPH, scores, unit="logits", meta={"method": "eap", "model": "<b>m</b>"}).greedy(30)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


class Reader(HTMLParser):
    """Tags with their attributes, and whether they balance."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_each_edge_is_drawn_once_in_its_colour_and_by_its_size(circuit):
    ax = draw(circuit)
    lines = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
    network = to_networkx(circuit)
    assert len(lines) == network.number_of_edges() >= 30
    kinds = [data["kind"] for *_, data in network.edges(data=True)]
    for kind, (_, colour) in _KINDS.items():
        drawn = [line for line in lines if to_hex(line.get_edgecolor()) == colour.lower()]
        assert len(drawn) == kinds.count(kind)
    strongest = max(lines, key=lambda line: line.get_linewidth())
    assert strongest is lines[-1] and strongest.get_linewidth() == pytest.approx(3.2)  # on top
    dashed = sum(line.get_linestyle() not in ("-", "solid") for line in lines)
    assert dashed == sum(data["score"] < 0 for *_, data in network.edges(data=True))
    names = {text.get_text() for text in ax.texts}
    assert {"logits", "layer 0"} <= names
    assert len(names - {f"layer {i}" for i in range(4)}) == network.number_of_nodes()


def test_lines_run_upwards_and_nodes_stand_apart(circuit):
    ax = draw(circuit)
    for line in (patch for patch in ax.patches if isinstance(patch, PathPatch)):
        ends = line.get_path().vertices[[0, -1], 1]
        assert ends[0] < ends[1]
    boxes = [patch.get_bbox() for patch in ax.patches if not isinstance(patch, PathPatch)]
    assert not any(a.count_overlaps([b]) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_query_arrives_on_the_left_and_a_value_on_the_right():
    edges = [("input", f"a1.{place}") for place in ("h0<q>", "g0<k>", "g0<v>")] + [("a1.h0", "logits")]
    ax = draw(Circuit.from_edges(GRAPH, edges))
    ends = {
        to_hex(patch.get_edgecolor()): patch.get_path().vertices[-1, 0]
        for patch in ax.patches if isinstance(patch, PathPatch)
    }  # fmt: skip
    q, k, v = (ends[_KINDS[kind][1].lower()] for kind in "qkv")
    assert q < k < v
    assert all(patch.get_linewidth() == 1.0 for patch in ax.patches if isinstance(patch, PathPatch))  # all scores equal


@pytest.mark.parametrize("n", [10, 60, 150])
def test_pictures_fit_a_paper(n):
    graph = Graph(30, 9, 3)
    every = Circuit.of(graph, np.random.default_rng(0).normal(size=graph.possible.shape), unit="logits")
    figure = draw(every.greedy(n)).get_figure()
    assert figure.get_figwidth() in (3.3, 6.9) and figure.get_figheight() <= 9


def details():
    rows = [
        {"component": "a1.h0", "metric": metric, "step": i, "k_pos": i if metric == "attention" else -1, "token": token,
         "value": 0.5}
        for metric in ("attention", "writes") for i, token in enumerate(HOSTILE)
    ]  # fmt: skip
    return Result("describe.describe_nodes", pd.DataFrame(rows), "logits", meta={"text": "".join(HOSTILE)})


def test_the_page_is_well_formed_inert_and_names_nothing_outside(tmp_path):
    circuit = Circuit.from_edges(GRAPH, [("input", "a1.h0<q>"), ("a1.h0", "logits")], meta={"model": HOSTILE[0]})
    shown = view(circuit, details=details())
    page = shown.save(tmp_path / "c.html").read_text(encoding="utf-8")
    for text in (shown._repr_html_(), page):
        reader = read(text)
        assert [tag for tag, _ in reader.tags].count("script") == 1 and "img" not in [tag for tag, _ in reader.tags]
        named = [value for _, attrs in reader.tags for key, value in attrs.items() if key in ("src", "href")]
        assert (
            named == []
            and "url(" not in text
            and "@import" not in text
            and "http" not in text.replace("http-equiv", "")
        )
        assert not any(key.startswith("on") for _, attrs in reader.tags for key in attrs)
        assert "\u202e" not in text
        assert "·a @3" in reader.text and r"\n @4" in reader.text  # visible space and line break, with the position
    assert "default-src 'none'" in page
    assert page == view(circuit, details=details()).save(tmp_path / "d.html").read_text(encoding="utf-8")


def test_every_node_and_edge_can_be_reached_by_keys_and_says_what_it_is(circuit):
    text = view(circuit).fragment
    reader = read(text)
    reachable = [attrs["aria-label"] for _, attrs in reader.tags if attrs.get("tabindex") == "0"]
    network = to_networkx(circuit)
    assert len(reachable) == network.number_of_edges() + network.number_of_nodes()
    for src, dst, score in circuit.edges.itertuples(index=False):
        assert f"{src} → {dst}: {score:+.4g} logits" in reachable
    panels = [attrs["data-for"] for _, attrs in reader.tags if "data-for" in attrs]
    assert panels == [attrs["data-id"] for _, attrs in reader.tags if "data-id" in attrs]
    assert "&lt;b&gt;m&lt;/b&gt;" in text
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    for scheme in re.findall(r"\{([^{}]*--paper:[^{}]*)\}", text):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))  # light and dark both define every colour


def test_a_node_lists_a_shared_key_once():
    edges = [("input", "a0.g0<k>"), ("a0.h0", "logits"), ("a0.h1", "logits")]
    text = view(Circuit.from_edges(GRAPH, edges)).fragment
    panel = text[text.index('data-for="0"') : text.index('data-for="1"')]
    assert panel.count("<tr>") == 1 and "a0.g0&lt;k&gt;" in panel


def test_networks_keep_kinds_apart_and_count_shared_keys_for_each_head():
    edges = [("a0.h0", f"a1.{place}") for place in ("h2<q>", "g1<k>", "g1<v>")] + [("a0.h0", "m1"), ("m1", "logits")]
    network = to_networkx(Circuit.from_edges(GRAPH, [*edges, ("a1.h2", "m1"), ("a1.h3", "logits")]))
    assert sorted(network["a0.h0"]["a1.h2"]) == ["k", "q", "v"]
    assert sorted(network["a0.h0"]["a1.h3"]) == ["k", "v"]
    assert network["a0.h0"]["a1.h3"]["k"]["input"] == "a1.g1<k>"
    assert network.nodes["a1.h3"] == {"kind": "head", "layer": 1, "head": 3}
    assert network.nodes["m1"] == {"kind": "mlp", "layer": 1, "head": -1}
    assert nx.is_directed_acyclic_graph(network)


def test_graphml_json_and_csv_hold_the_network(circuit, tmp_path):
    paths = export.save(circuit, tmp_path / "circuit")
    assert [path.name for path in paths] == ["circuit.graphml", "circuit.json", "circuit.csv"]
    network = to_networkx(circuit)

    def plain(graph):
        return sorted((a, b, data["kind"], data["score"], data["input"]) for a, b, data in graph.edges(data=True))

    read_back = nx.read_graphml(paths[0], force_multigraph=True)
    assert plain(read_back) == plain(network) and dict(read_back.nodes(data=True)) == dict(network.nodes(data=True))
    data = json.loads(paths[1].read_text())
    assert plain(nx.node_link_graph(data, edges="edges")) == plain(network)
    assert data["graph"]["unit"] == "logits" and data["graph"]["meta"]["method"] == "eap"
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), circuit.edges, check_dtype=False)
    before = [path.read_bytes() for path in paths]
    assert before == [path.read_bytes() for path in export.save(circuit, tmp_path / "circuit")]
    with pytest.raises(ValueError, match="'tex' is not a format that a Circuit is saved in"):
        export.save(circuit, tmp_path / "circuit.tex")


def test_what_cannot_be_read_is_refused():
    every = Circuit.of(GRAPH, np.zeros(GRAPH.possible.shape), unit="logits")
    big = Graph(12, 12, 12)
    with pytest.raises(ValueError, match=r"has 32491 edges; .* with 1 to 400: draw its best ones"):
        draw(Circuit.of(big, np.zeros(big.possible.shape), unit="logits"))
    with pytest.raises(ValueError, match="has 0 edges"):
        view(every.top(0))
    with pytest.raises(ValueError, match="without 'component'"):
        view(every.top(3), details=Result("x", pd.DataFrame({"token": ["a"], "value": 1.0, "metric": "m"}), "u"))
