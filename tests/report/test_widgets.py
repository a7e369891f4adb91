"""Widgets carry their script, small numbers, and tokens that can do nothing."""

import json
import re
from html.parser import HTMLParser
from urllib import request

import numpy as np
import pytest
from circuitsvis.utils.render import RenderedHTML
from IPython.core.formatters import HTMLFormatter

from interp.report import widgets

HOSTILE = ["</script><script>x=1</script>", "<!--<script>", "<img/src=x/onerror=x()>", "&lt;", " a", "\n"]


def props(widget):
    """The properties handed to circuitsvis, read back as a browser's JSON would."""
    return json.loads(
        re.search(r"CircuitsVis\.render\(place\.id, CircuitsVis\.\w+, (.*)\);\n</script>", str(widget))[1]
    )


def causal(n_heads, n):
    scores = np.tril(np.random.default_rng(0).random((n_heads, n, n)))
    return scores / scores.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", ["attention", "colored"])
def test_a_token_can_neither_end_the_script_nor_open_a_comment(kind):
    n = len(HOSTILE)
    widget = (
        widgets.attention(HOSTILE, causal(2, n)) if kind == "attention" else widgets.colored_tokens(HOSTILE, range(n))
    )
    html = str(widget)
    assert len(re.findall("<script", html[: html.index("\n", 200)])) == 1
    assert html.lower().count("</script") == 1
    assert "<!--" not in html
    assert len(props(widget)["tokens"]) == n


def test_colored_tokens_are_inert_as_html_because_circuitsvis_sets_them_as_html():
    seen = []

    class Reader(HTMLParser):
        def notice(self, *found):
            seen.append(found)

        handle_starttag = handle_endtag = handle_comment = notice
        handle_decl = handle_pi = handle_entityref = handle_charref = notice

    given = props(widgets.colored_tokens(HOSTILE, range(len(HOSTILE))))["tokens"]
    for token in given:
        reader = Reader(convert_charrefs=False)
        reader.feed(token)
        reader.close()
    assert seen == []
    # What the reader sees is the token: only characters without width were added.
    assert [t.replace("\u2060", "") for t in given[:4]] == HOSTILE[:4]
    assert given[4:] == ["·a", r"\n"]


def test_attention_draws_tokens_as_text_so_they_are_left_alone():
    assert props(widgets.attention(HOSTILE, causal(1, len(HOSTILE))))["tokens"][:4] == HOSTILE[:4]


def test_numbers_are_rounded_to_four_digits_of_the_largest():
    values = np.array([1234.56789, -0.123456, 0.0])
    given = props(widgets.colored_tokens(["a", "b", "c"], values))["values"]
    assert given == [1235.0, 0.0, 0.0]
    pattern = causal(3, 20)
    rounded = np.array(props(widgets.attention(["t"] * 20, pattern))["attention"])
    # Half a unit of the fourth digit of a largest value of 1.
    assert np.abs(rounded - pattern).max() <= 0.5e-3
    assert len(json.dumps(rounded.tolist())) < 8 * pattern.size


def test_upper_triangle_is_hidden_only_where_it_is_empty():
    assert props(widgets.attention(["a", "b"], causal(2, 2)))["maskUpperTri"] is True
    assert props(widgets.attention(["a", "b"], np.full((2, 2, 2), 0.5)))["maskUpperTri"] is False


def test_head_names_are_shown():
    assert props(widgets.attention(["a"], np.ones((2, 1, 1)), head_names=["5.1", "7.0"]))["attentionHeadNames"] == [
        "5.1",
        "7.0",
    ]


def test_html_is_self_contained_and_shown_without_asking_the_network(monkeypatch):
    asked = []
    monkeypatch.setattr(request, "urlopen", lambda *args, **kwargs: asked.append(args))
    widget = widgets.colored_tokens(["a"], [1.0])
    assert isinstance(widget, RenderedHTML)
    html = HTMLFormatter()(widget)
    assert asked == []
    assert "var CircuitsVis=" in html
    assert "unpkg" not in html
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", html)


def test_equal_data_give_equal_html_and_other_data_another_place():
    one, two, other = (str(widgets.colored_tokens(["a"], [v])) for v in (1.0, 1.0, 2.0))
    assert one == two
    assert one[:60] != other[:60]


def test_the_place_it_draws_in_is_closed_so_a_page_goes_on_after_it():
    assert str(widgets.colored_tokens(["a"], [1.0])).split("\n")[0].endswith("></div>")


def test_wrong_shapes_and_values_are_refused():
    with pytest.raises(ValueError, match=r"2 positions.*got \(3, 3\)"):
        widgets.attention(["a", "b"], np.ones((3, 3)))
    with pytest.raises(ValueError, match="1 head names for 2 heads"):
        widgets.attention(["a"], np.ones((2, 1, 1)), head_names=["x"])
    with pytest.raises(ValueError, match=r"2 tokens; got \(3,\)"):
        widgets.colored_tokens(["a", "b"], [1, 2, 3])
    with pytest.raises(ValueError, match=r"1 values are not finite, the first at index \(1,\)"):
        widgets.colored_tokens(["a", "b"], [1, np.nan])
