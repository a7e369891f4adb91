"""The figure and the page say what the scores say, and a token or a name on them is only ever text."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import warnings
from html.parser import HTMLParser

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from interp.core.result import Result
from interp.report import _drawing, atlas, export, plots
from interp.weights.describe import DESCRIPTORS

HOSTILE = ["</script><script>x=1</script>", "<!--<script>", "<img src=x onerror=x()>", "&lt;", " a", "\n", "$x_{$"]
#: As a reader sees them.
SHOWN = [*HOSTILE[:2], "<img·src=x·onerror=x()>", "&lt;", "·a", r"\n", "$x_{$"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def scores(promotes, suppresses=None, *, names=None, layers=None):
    """A Result like that of `relation_scores`, from arrays `[relation layer head]`."""
    promotes = np.asarray(promotes, dtype=float)
    suppresses = np.zeros_like(promotes) if suppresses is None else np.asarray(suppresses, dtype=float)
    names = names or [f"r{i}" for i in range(len(promotes))]
    relation, layer, head = (axis.ravel() for axis in np.indices(promotes.shape))
    if layers is not None:
        layer = np.asarray(layers)[layer]
    table = pd.concat([
        pd.DataFrame({
            "target": np.array(names, dtype=object)[relation], "layer": layer, "head": head, "metric": metric,
            "value": values.ravel(),
        })
        for metric, values in (("promotes", promotes), ("suppresses", suppresses))
    ])  # fmt: skip
    meta = {"model": "a <model>", "n_layers": promotes.shape[1], "n_heads": promotes.shape[2],
            "k": {name: 10 for name in names}}  # fmt: skip
    return Result("maps.relation_scores", table.sample(frac=1, random_state=0), "share of pairs", meta=meta)


def small():
    """Head 0.1 promotes "b" most, 1.0 suppresses "a" more than it promotes "b", 1.2 is weak, others nothing."""
    promotes, suppresses = np.zeros((2, 2, 2, 3))
    promotes[:, 0, 1], promotes[1, 1, 0], suppresses[0, 1, 0] = (0.2, 0.95), 0.3, 0.55
    promotes[0, 1, 2] = 0.149
    return scores(promotes, suppresses, names=["a", "b"])


def texts(ax):
    """Draw to a PNG, with every warning an error, and return the legend's lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.get_figure(root=True).savefig(io.BytesIO())
    return [text.get_text() for text in ax.get_legend().get_texts()]


def data_of(page):
    """What the page's script reads, as a browser's JSON would."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', str(page), re.DOTALL)[1])


def test_a_head_has_the_colour_and_the_strength_of_its_strongest_relation():
    ax = atlas.atlas_figure(small())
    cells = ax.images[0].get_array()
    assert cells.shape == (2, 3, 4)
    blank = np.ones(4)
    # Two relations with one head each: the names' order gives "a" the first colour.
    np.testing.assert_allclose(cells[0, 1], to_rgba(_drawing.COLOURS[1], 1.0))
    for at in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2)):
        np.testing.assert_array_equal(cells[at], blank)
    (frame,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert (round(frame.get_x() + frame.get_width() / 2), round(frame.get_y() + frame.get_height() / 2)) == (0, 1)
    # Half of the way from the threshold of 0.15 to 0.95.
    np.testing.assert_allclose(frame.get_edgecolor(), to_rgba(_drawing.COLOURS[0], 0.3 + 0.7 * 0.5))
    assert texts(ax) == ["a (1)", "b (1)", "score 0.15", "score 0.95", "frame: suppresses"]
    assert ax.get_legend().get_title().get_text() == "relation (heads)"


def test_the_threshold_counts_from_its_own_value_on_and_promotion_goes_first_among_equals():
    # [relation layer head]: only head 0 has a score, of the same size both ways.
    ax = atlas.atlas_figure(scores([[[0.15, 0.1499]]], [[[0.15, 0.0]]]))
    cells = ax.images[0].get_array()
    assert not (cells[0, 0] == 1).all() and (cells[0, 1] == 1).all()
    assert not ax.patches
    assert atlas.atlas_figure(scores([[[0.1]]])).get_legend() is None  # no head counts
    with pytest.raises(ValueError, match="threshold=0"):
        atlas.atlas_figure(small(), threshold=0.0)


def test_groups_beyond_the_sixth_are_grey_together():
    values = np.zeros((9, 1, 30))
    for relation in range(9):  # relation 8 is the strongest of 8 heads, ... relation 0 of none
        values[relation, 0, relation * 3 : relation * 3 + 3] = 0.5 if relation else 0.0
    values[8, 0, 27:] = 0.9
    ax = atlas.atlas_figure(scores(values))
    labels = texts(ax)
    assert labels[:7] == ["r8 (6)", *(f"r{i} (3)" for i in range(1, 6)), "2 others (6)"]
    cells = ax.images[0].get_array()[0]
    grey = to_rgba(atlas.OTHER)[:3]
    assert [(cell[:3] == grey).all() for cell in cells] == [18 <= head < 24 for head in range(30)]
    assert (cells[:3] == 1).all()


def test_relations_of_one_group_share_a_colour():
    ax = atlas.atlas_figure(scores([[[0.5, 0]], [[0, 0.5]]]), categories={"r0": "code", "r1": "code"})
    cells = ax.images[0].get_array()[0]
    np.testing.assert_array_equal(cells[0], cells[1])
    assert texts(ax)[0] == "code (2)" and ax.get_legend().get_title().get_text() == "group (heads)"
    assert texts(atlas.atlas_figure(scores([[[0.5]]]), categories={}))[0] == "r0 (1)"


@pytest.mark.parametrize(("n_layers", "n_heads", "width"), [(30, 9, plots.SINGLE), (48, 25, plots.DOUBLE)])
def test_a_figure_of_a_column_is_made_and_its_text_stays_inside(n_layers, n_heads, width):
    rng = np.random.default_rng(0)
    names = [f"a_relation_of_length_{i}" for i in range(12)]
    ax = atlas.atlas_figure(scores(rng.random((12, n_layers, n_heads)) ** 9, names=names))
    texts(ax)
    figure = ax.get_figure()
    assert figure.get_figwidth() == width and figure.get_figheight() <= 5.5
    box = figure.get_tightbbox()
    # Half a point: anti-aliasing of text at the edge.
    slack = 0.5 / 72
    assert min(box.x0, box.y0) >= -slack
    assert box.x1 <= figure.get_figwidth() + slack and box.y1 <= figure.get_figheight() + slack
    # With names of 24 characters, longer than any that ships, the heads keep a third of the width.
    assert ax.get_position().width > 1 / 3


def test_the_axes_given_are_drawn_on_and_nothing_global_changes(tmp_path):
    _, (left, right) = plt.subplots(1, 2)
    before = dict(mpl.rcParams)
    assert atlas.atlas_figure(small(), ax=right) is right
    assert not left.has_data() and dict(mpl.rcParams) == before
    paths = [export.save(atlas.atlas_figure(small()), tmp_path / f"{i}.svg")[0] for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_layers_are_named_by_their_numbers():
    made = scores(np.full((1, 2, 1), 0.5), layers=[3, 20])
    assert [text.get_text() for text in atlas.atlas_figure(made).get_yticklabels()] == ["3", "20"]
    assert data_of(atlas.atlas_html(made))["layers"] == [3, 20]


# --- the page ------------------------------------------------------------------------------------------------------


def found(names=HOSTILE):
    """Mappings of head (1, 0), two targets a source, and its descriptors."""
    n = len(names)
    mappings = pd.DataFrame({
        "layer": 1, "head": 0, "src": np.repeat(names, 2), "dst": np.roll(np.repeat(names, 2), 1), "value": 1.0,
        "value_saliency": np.repeat(np.arange(n, 0, -1) / 3, 2), "value_source": np.repeat(np.arange(n), 2),
    })  # fmt: skip
    descriptors = pd.DataFrame({
        "layer": 1, "head": 0, "metric": DESCRIPTORS, "value": 0.123456, "value_control": 0.0, "value_p": 1.0,
    })  # fmt: skip
    return {
        "mappings": Result("salient.mappings", mappings, "logits"),
        "descriptors": Result("describe.descriptors", descriptors, "share of mappings"),
    }


class Reader(HTMLParser):
    """Start tags with their attributes, and whether all were closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_every_heads_scores_and_what_it_maps():
    data = data_of(atlas.atlas_html(small(), **found()))
    assert data["relations"] == ["a", "b"] or data["relations"] == ["b", "a"]
    a, b = (data["relations"].index(name) for name in "ab")
    assert set(data["cells"]) == {f"{layer}.{head}" for layer in range(2) for head in range(3)}
    cell = data["cells"]["1.0"]
    assert (cell["promotes"][b], cell["suppresses"][a], cell["promotes"][a]) == (300, 550, 0)
    assert cell["best"] == [a, False, 0.65] and cell["colour"] == _drawing.COLOURS[0]
    assert data["cells"]["0.1"]["best"] == [b, True, 1.0]
    assert data["cells"]["1.2"]["promotes"][a] == 149 and "best" not in data["cells"]["1.2"]
    assert [source for source, _, _ in cell["mappings"]] == SHOWN
    assert cell["mappings"][0] == [SHOWN[0], 2.33, [SHOWN[-1], SHOWN[0]]]
    assert [targets for _, _, targets in cell["mappings"][1:]] == [[*pair] for pair in itertools.pairwise(SHOWN)]
    assert cell["descriptors"][0] == ["copy", 0.123, 0.0, 1.0] and len(cell["descriptors"]) == len(DESCRIPTORS)
    assert "mappings" not in data["cells"]["0.1"]


def test_no_token_and_no_name_is_markup():
    hostile = scores(np.full((len(HOSTILE), 1, 7), 0.2) + np.eye(len(HOSTILE))[:, None] / 2, names=HOSTILE)
    page = str(atlas.atlas_html(hostile, mappings=found()["mappings"], categories={"&lt;": "<b>"}))
    tags = Reader(page).tags
    assert [tag for tag, _ in tags].count("script") == 2
    assert not {"img", "b"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attributes in tags for name in attributes)
    assert "<!--" not in page
    assert set(data_of(page)["relations"]) == set(SHOWN)
    assert "&lt;b&gt; (1)" in page


def test_the_page_loads_nothing_and_only_its_own_script_may_run():
    page = str(atlas.atlas_html(small(), **found()))
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import", page)
    policy = next(a["content"] for tag, a in Reader(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # Nothing that reads a text as markup.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", script)
    assert page == str(atlas.atlas_html(small(), **found()))


def test_a_whole_model_is_a_small_page():
    rng = np.random.default_rng(0)
    made = scores(rng.random((46, 30, 9)))
    tokens = [f" token{i}" for i in range(15)]
    mappings = pd.concat([
        found(tokens)["mappings"].table.assign(layer=layer, head=head) for layer in range(30) for head in range(9)
    ])  # fmt: skip
    assert len(str(atlas.atlas_html(made, mappings=Result("salient.mappings", mappings, "logits")))) < 1e6


def test_a_notebook_shows_it_in_a_frame_and_save_writes_it(tmp_path):
    page = atlas.atlas_html(small(), **found())
    ((tag, attributes),) = Reader(page._repr_html_()).tags
    assert tag == "iframe" and attributes["srcdoc"] == str(page) and attributes["sandbox"] == "allow-scripts"
    assert page.save(tmp_path / "atlas.html").read_text(encoding="utf-8") == str(page)
