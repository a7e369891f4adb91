"""The figure and the page show the tokens of the table, where they belong, and a token is only ever text."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
import warnings
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from interp.core.result import Result
from interp.lenses.attention import direct
from interp.lenses.reading import top_tokens as read_tokens
from interp.models import toy
from interp.report import _drawing, lens, notebooks, plots

HOSTILE = [
    "</script><script>x=1</script>",
    "<!--<script>",
    "<img src=x onerror=x()>",
    "&lt;",
    " a",
    "\n",
    "$x_{$",
    "\u202eb",
]
#: As a reader sees them.
SHOWN = [*HOSTILE[:2], "<img·src=x·onerror=x()>", "&lt;", "·a", r"\n", "$x_{$", r"\u202eb"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def made(*, words=None, positions=((0, 1), (0, 2), (1, 2)), layers=(3, 7), heads=(0, 1, 2), stream=True, k=4):
    """A Result like that of `reading.top_tokens`: the word tells where it is from, the value shrinks with the rank."""
    rows = []
    own = [(layer, head, name) for layer in layers for head in heads for name in ("additive", "direct")]
    own += [(layer, -1, "logit lens") for layer in layers] if stream else []
    for number, ((prompt, pos), (layer, head, name)) in enumerate(itertools.product(positions, sorted(own))):
        for side, sign in (("promotes", 1), ("suppresses", -1)):
            for rank in range(k):
                word = f"{side[0]}{prompt}{pos}{layer}{head}{name[0]}{rank}"
                token = word if words is None else words[(number + rank) % len(words)]
                value = sign * (10 + layer + head / 10) / (1 + rank) / (1 if name == "additive" else 2)
                rows.append([prompt, pos, " s", layer, head, name, side, token, value, rank, number])
    columns = [
        "prompt",
        "pos",
        "src",
        "layer",
        "head",
        "component",
        "metric",
        "token",
        "value",
        "value_rank",
        "value_token",
    ]
    meta = {
        "model": "a <model>", "prompts": [["The", " cat", " sat"], [None, "<b>", " ran"]],
        "estimands": {"additive": "additive", "direct": "direct", "logit lens": "logit"},
    }  # fmt: skip
    return Result("reading.top_tokens", pd.DataFrame(rows, columns=columns), "logits", meta=meta)


def drawn(ax):
    """{text: (x, y)} of a figure, drawn to a PNG with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.get_figure(root=True).savefig(io.BytesIO())
    return {text.get_text(): text.get_position() for text in ax.texts}


# --- the figure ----------------------------------------------------------------------------------------------------


def test_each_token_stands_in_its_head_s_line_and_its_lens_s_column():
    ax = lens.top_tokens(made(), n=2)
    at = drawn(ax)
    assert "position 2, after The·cat·sat" in at
    names = [(layer, head) for layer in (3, 7) for head in (0, 1, 2)]
    lines = {row: 3 + 2 * index for index, row in enumerate(names)}
    starts = [at[name][0] for name in ("additive", "direct", "logit lens")]
    assert starts == sorted(starts)
    for (layer, head), line in lines.items():
        assert at[f"{layer}.{head}"][1] == line + 0.5
        for column, name in enumerate(("additive", "direct", "logit lens")):
            shown = -1 if name == "logit lens" else head
            for below, side in enumerate("ps"):
                places = [
                    text.get_position() for text in ax.texts
                    if text.get_text() in [f"{side}02{layer}{shown}{name[0]}{rank}" for rank in range(4)]
                ]  # fmt: skip
                inside = [(x, y) for x, y in places if y == line + below]
                assert len(inside) == 2  # n tokens, the strongest
                assert all(starts[column] <= x < [*starts[1:], np.inf][column] for x, _ in inside)
                assert f"{side}02{layer}{shown}{name[0]}2" not in at


def test_colours_tell_the_side_and_grow_with_the_value():
    ax = lens.top_tokens(made(stream=False), heads=[(7, 2), (3, 0)], n=3)
    drawn(ax)
    chips = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert len(chips) == 2 * 2 * 2 * 3
    for chip in chips:
        line = round(chip.get_y() + 0.42)
        side = _drawing.COLOURS[(line - 3) % 2]  # the upper line of a head promotes
        assert chip.get_facecolor()[:3] == pytest.approx(to_rgb(side))
    first = [chip.get_facecolor()[3] for chip in chips[:3]]
    assert first == sorted(first, reverse=True) and first[0] == pytest.approx(0.65)  # the largest of the figure
    other = [chip.get_facecolor()[3] for chip in chips if round(chip.get_y() + 0.42) == 5]
    assert other[0] == pytest.approx(0.05 + 0.6 * 13 / 17.2)  # 3.0 beside 7.2
    assert "full colour: 17 logits" in drawn(ax) and "full colour: 8.6 logits" in drawn(ax)


def test_prompt_position_and_heads_are_chosen():
    assert "position 1, after The·cat" in drawn(lens.top_tokens(made(), pos=1))
    assert "position 2, after <b>·ran" in drawn(lens.top_tokens(made(), prompt=1))  # the padding left out
    assert "3.1" not in drawn(lens.top_tokens(made(), heads=[(7, 1)]))
    many = made(layers=range(6), heads=range(6), stream=False)
    labels = [text for text in drawn(lens.top_tokens(many)) if re.fullmatch(r"\d\.\d", text)]
    assert labels == ["4.2", "4.3", "4.4", "4.5", *(f"5.{head}" for head in range(6))]  # the ten largest, in order
    with pytest.raises(ValueError, match="pos 0 was not read, only 1, 2"):
        lens.top_tokens(made(), pos=0)
    with pytest.raises(ValueError, match=r"head \(5, 0\) was not read"):
        lens.top_tokens(made(), heads=[(5, 0)])
    with pytest.raises(ValueError, match="26 heads were asked for"):
        lens.top_tokens(many, heads=[(3, 0)] * 26)
    with pytest.raises(KeyError, match="no column 'component'"):
        lens.top_tokens(Result("x", pd.DataFrame({"prompt": [0], "pos": 0, "layer": 0, "head": 0}), "u"))


def test_hostile_and_long_tokens_stay_in_their_column():
    words = [*HOSTILE, "x" * 90]
    ax = lens.top_tokens(made(words=words), n=9)
    at = drawn(ax)
    assert "·a" in at and r"\n" in at and "$x_{$" in at
    starts = [at[name][0] for name in ("additive", "direct", "logit lens")]
    for chip in ax.patches:
        column = sum(chip.get_x() >= start for start in starts) - 1
        assert chip.get_x() + chip.get_width() <= [*starts[1:], ax.get_xlim()[1] + 1][column]
    figure = ax.get_figure()
    assert figure.get_figwidth() == plots.DOUBLE and figure.get_figheight() < 9
    box = figure.get_tightbbox()
    assert (
        box.x1 <= plots.DOUBLE + 0.02 and box.y1 <= figure.get_figheight() + 0.02
    )  # a hundredth of an inch and a half


def test_a_result_draws_itself_also_on_axes_that_are_given():
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 3))
    assert made().plot("top_tokens", ax=right, n=1) is right
    assert not left.texts and right.texts


def test_wide_characters_count_as_two():
    assert lens._cut("漢字" * 3, 12) == "漢字" * 3
    assert lens._cut("漢字" * 3, 8) == "漢字漢…"


# --- the page ------------------------------------------------------------------------------------------------------


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


def data_of(page):
    """What the page's script reads, as a browser's JSON would."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', str(page), re.DOTALL)[1])


def test_the_page_holds_the_whole_table():
    result = made()
    data = data_of(lens.lens_html(result))
    assert [item["name"] for item in data["lenses"]] == ["additive", "direct", "logit lens"]
    assert [item["stream"] for item in data["lenses"]] == [False, False, True]
    assert (data["layers"], data["heads"]) == ([3, 7], [0, 1, 2])
    assert data["prompts"] == [["The", "·cat", "·sat"], [None, "<b>", "·ran"]]
    found = set()
    for place in data["places"]:
        for cell, lenses in place["cells"].items():
            layer, head = cell.split(".")
            for number, (up, highs, down, lows) in lenses.items():
                name = data["lenses"][int(number)]["name"]
                for side, ids, values in (("promotes", up, highs), ("suppresses", down, lows)):
                    for rank, (word, value) in enumerate(zip(ids, values, strict=True)):
                        key = (place["prompt"], place["pos"], int(layer), int(head), name, side, rank)
                        found.add((*key, data["words"][word], value))
    table = result.table
    wanted = {
        (r.prompt, r.pos, r.layer, r.head, r.component, r.metric, r.value_rank, r.token, float(f"{r.value:.3g}"))
        for r in table.itertuples()
    }  # fmt: skip
    assert found == wanted and len(found) == len(table)


def test_the_order_of_the_rows_does_not_matter():
    result = made()
    mixed = Result(result.method, result.table.sample(frac=1, random_state=0), "logits", meta=result.meta)
    one, other = (data_of(lens.lens_html(r)) for r in (result, mixed))
    assert [sorted(p["cells"]) for p in one["places"]] == [sorted(p["cells"]) for p in other["places"]]
    cell = other["places"][0]["cells"]["3.0"]
    names = [item["name"] for item in other["lenses"]]
    ids, values, *_ = cell[str(names.index("additive"))]
    assert values == sorted(values, reverse=True)
    assert [other["words"][i] for i in ids] == [f"p0130a{rank}" for rank in range(4)]


def test_no_token_is_markup_and_only_the_page_s_own_script_may_run():
    result = made(words=HOSTILE)
    result.meta["prompts"][0][1] = HOSTILE[0]
    page = str(lens.lens_html(result))
    tags = Reader(page).tags
    assert [tag for tag, _ in tags].count("script") == 2
    assert not {"img", "b", "model"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attributes in tags for name in attributes)
    assert "<!--" not in page and "\u202e" not in page
    assert "a &lt;model&gt;" in page
    assert set(data_of(page)["words"]) == set(SHOWN)
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import", page)
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", script)
    # Every element that the script asks for is in the page.
    assert set(re.findall(r'getElementById\("(\w+)"\)', script)) <= {attributes.get("id") for _, attributes in tags}


def test_each_lens_is_explained_and_each_text_can_be_chosen():
    page = str(lens.lens_html(made()))
    assert page.count("<dt>") == 3 and "a token that the head suppresses may come first" not in page
    assert "what the head itself adds" in page
    assert '<option value="0">The·cat·sat</option>' in page and '<option value="1">&lt;b&gt;·ran</option>' in page


def test_a_notebook_shows_it_in_a_frame_that_the_report_finds(tmp_path):
    page = lens.lens_html(made())
    ((tag, attributes),) = Reader(page._repr_html_()).tags
    assert tag == "iframe" and attributes["srcdoc"] == str(page) and attributes["sandbox"] == "allow-scripts"
    assert notebooks._FRAME.fullmatch(page._repr_html_())
    assert len(repr(page)) < 100  # a notebook stores this beside the page
    assert page.save(tmp_path / "lens.html").read_text(encoding="utf-8") == str(page)


def test_what_the_method_returns_is_drawn(tmp_path):
    model = toy.induction()
    result = read_tokens(model, {"direct": direct(model), "logit": "logit"}, ["w2 w3 w4 w2", "w5 w6 w5"], k=3)
    result.save(tmp_path)
    for table in (result, Result.load(tmp_path)):
        at = drawn(lens.top_tokens(table, prompt=0))
        assert "w3" in at and "position 3, after w2w3w4w2" in at
        data = data_of(lens.lens_html(table))
        assert [item["name"] for item in data["lenses"]] == ["direct", "logit"]
        cell = data["places"][0]["cells"]["1.0"]["0"]
        assert data["words"][cell[0][0]] == "w3"
