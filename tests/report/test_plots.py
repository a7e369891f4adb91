"""What a figure shows is what the table says, and a token in it is only ever text."""

import io
import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import FillBetweenPolyCollection

from interp.core.result import Result
from interp.report import _drawing, plots

#: An unclosed group between dollar signs is what matplotlib's mathematics would raise on.
HOSTILE = ["$x_{$", "_under", " a", "\n", "<|end|>", "%&#\\{}~^"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def result(n_layers=6, n_heads=3, n_prompts=8, unit="logits", **columns):
    """Prompts x layers x heads, with a different value in every row."""
    index = pd.MultiIndex.from_product(
        [range(n_prompts), range(n_layers), range(n_heads)], names=["prompt", "layer", "head"]
    )
    table = index.to_frame(index=False)
    values = np.random.default_rng(1).normal(size=len(table)) + table["layer"].to_numpy()
    return Result("a method", table.assign(value=values, **columns), unit)


def drawn(ax):
    """Draw to a PNG, with every warning an error, and return the texts on the axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.get_figure(root=True).savefig(io.BytesIO())
    return [text.get_text() for text in ax.findobj(mpl.text.Text) if text.get_text() and text.get_visible()]


def calls():
    r = result()
    return {
        "heatmap": lambda **k: plots.heatmap(r, **k),
        "lines": lambda **k: plots.lines(r, group="head", **k),
        "bars": lambda **k: plots.bars(r, x="layer", group="head", **k),
        "scatter": lambda **k: plots.scatter(r, x="layer", y="value", label="head", **k),
        "pattern": lambda **k: plots.pattern(np.tri(4) / 4, **k),
        "tokens": lambda **k: plots.tokens(["a", " b"], [1.0, -2.0], unit="logits", **k),
    }


@pytest.mark.parametrize("kind", calls())
def test_the_axes_given_are_drawn_on_and_returned_and_nothing_global_changes(kind):
    fig, (left, right) = plt.subplots(1, 2)
    before = dict(mpl.rcParams)
    assert calls()[kind](ax=right) is right
    assert not left.has_data()
    assert not left.texts
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == [fig.number]


@pytest.mark.parametrize("kind", calls())
def test_without_axes_a_figure_of_a_column_is_made_and_its_text_stays_inside(kind):
    ax = calls()[kind]()
    drawn(ax)
    figure = ax.get_figure()
    assert figure.get_figwidth() in (plots.SINGLE, plots.DOUBLE)
    box = figure.get_tightbbox()
    # Half a point: anti-aliasing of text at the edge.
    slack = 0.5 / 72
    assert box.x0 >= -slack
    assert box.y0 >= -slack
    assert box.x1 <= figure.get_figwidth() + slack
    assert box.y1 <= figure.get_figheight() + slack


def test_result_plot_draws_every_kind():
    for kind, options in {
        "heatmap": {},
        "lines": {},
        "bars": {"x": "layer"},
        "scatter": {"x": "layer", "y": "value"},
    }.items():
        assert isinstance(result().plot(kind, **options), mpl.axes.Axes)
    assert set(plots.RESULT_KINDS) == {"heatmap", "lines", "bars", "scatter", "top_tokens"}


def test_heatmap_cells_are_the_grid_and_the_bar_has_the_unit():
    r = result()
    ax = plots.heatmap(r)
    np.testing.assert_array_equal(ax.images[0].get_array(), r.grid("layer", "head").to_numpy())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")
    assert ax.images[0].colorbar.ax.get_ylabel() == "logits"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2", "3", "4", "5"]
    tidy, matrix = plots.heatmap(r.table, unit="nats"), plots.heatmap(r.grid("layer", "head"))
    assert [other.images[0].colorbar.ax.get_ylabel() for other in (tidy, matrix)] == ["nats", "value"]
    for other in (tidy, matrix):
        np.testing.assert_array_equal(other.images[0].get_array(), ax.images[0].get_array())


def test_heatmap_ticks_name_the_layers_there_are_not_their_order():
    ax = plots.heatmap(result().filter(layer=[1, 4]))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "4"]


def test_heatmap_rows_of_text_keep_the_tables_order():
    table = pd.DataFrame({"token": [" z", " a", " m"] * 2, "layer": [0, 0, 0, 1, 1, 1], "value": range(6)})
    ax = plots.heatmap(Result("m", table, "nats"), rows="token", columns="layer")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["·z", "·a", "·m"]
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0, 3], [1, 4], [2, 5]])


def test_only_columns_of_tokens_show_their_spaces():
    table = pd.DataFrame({"target": ["end <- subject2", "random 0"], "value": [1.0, 2.0]})
    ax = plots.bars(Result("m", table, "nats"), x="target")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["end <- subject2", "random 0"]
    ax = plots.lines(Result("m", pd.concat([table.assign(layer=i) for i in (0, 1)]), "nats"), group="target")
    assert [t.get_text() for t in ax.texts] == ["end <- subject2", "random 0"]


def test_numbers_are_in_ascending_order_whatever_the_tables():
    r = result()
    shuffled = Result("m", r.table.sample(frac=1, random_state=0), "logits")
    in_order, other = plots.heatmap(r), plots.heatmap(shuffled)
    # Means of the same numbers in another order of summation.
    np.testing.assert_allclose(other.images[0].get_array(), in_order.images[0].get_array(), rtol=1e-12)
    assert [t.get_text() for t in plots.bars(shuffled, x="layer").get_xticklabels()] == ["0", "1", "2", "3", "4", "5"]


def test_signed_values_are_centred_on_white_and_others_are_not():
    signed = plots.heatmap(pd.DataFrame({"layer": [0, 1], "head": [0, 0], "value": [-1.0, 3.0]})).images[0]
    assert (signed.norm.vmin, signed.norm.vmax) == (-3.0, 3.0)
    assert min(signed.cmap(signed.norm(0.0))[:3]) > 0.95
    positive = plots.heatmap(pd.DataFrame({"layer": [0, 1], "head": [0, 0], "value": [1.0, 3.0]})).images[0]
    assert (positive.norm.vmin, positive.norm.vmax, positive.cmap.name) == (1.0, 3.0, "viridis")
    rounding = plots.heatmap(pd.DataFrame({"layer": [0, 1], "head": [0, 0], "value": [-1e-9, 3.0]})).images[0]
    assert rounding.cmap.name == "viridis"


def test_a_cell_without_a_value_is_grey_not_zero():
    frame = pd.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0], "value": [1.0, np.inf, 2.0]})
    image = plots.heatmap(frame).images[0]
    np.testing.assert_array_equal(image.get_array().mask, [[False, True], [False, True]])
    assert image.cmap.get_bad()[:3] == pytest.approx([0.85] * 3)


def test_lines_and_bands_are_the_summary():
    r = result()
    ax = plots.lines(r, group="head")
    summary = r.summary(["layer", "head"])
    bands = [c for c in ax.collections if isinstance(c, FillBetweenPolyCollection)]
    assert len(ax.lines) == len(bands) == 3
    for head, (line, band) in enumerate(zip(ax.lines, bands, strict=True)):
        part = summary[summary["head"] == head]
        np.testing.assert_array_equal(line.get_xdata(), part["layer"])
        np.testing.assert_array_equal(line.get_ydata(), part["mean"])
        corners = band.get_paths()[0].vertices
        for layer, low, high in zip(part["layer"], part["low"], part["high"], strict=True):
            there = corners[corners[:, 0] == layer, 1]
            assert (there.min(), there.max()) == (low, high)
    assert ax.get_ylabel() == "logits"
    assert drawn(ax).count("head 2") == 1


def test_lines_have_no_band_without_prompts_or_when_not_wanted():
    r = result()
    averaged = Result("m", r.table.groupby(["layer", "head"])["value"].mean().reset_index(), "nats")
    ax = plots.lines(averaged)
    assert not ax.collections
    # Mean of three numbers in another order of summation.
    np.testing.assert_allclose(ax.lines[0].get_ydata(), r.summary(["layer"])["mean"], rtol=1e-12)
    assert not plots.lines(r, band=False).collections


def test_names_of_lines_stand_apart_in_the_order_of_the_lines():
    rows = [
        {"layer": x, "component": c, "value": 1 + 0.001 * i + (c == "far")}
        for x in (0, 1)
        for i, c in enumerate(["a", "b", "c", "far"])
    ]
    ax = plots.lines(Result("m", pd.DataFrame(rows), "nats"), group="component")
    drawn(ax)
    names = sorted((t.get_window_extent().y0, t.get_window_extent().y1, t.get_text()) for t in ax.texts)
    assert [n for _, _, n in names] == ["a", "b", "c", "far"]
    bottoms = np.array([y0 for y0, _, _ in names])
    # A line of 7 pt text is about 0.1 inch.
    assert np.diff(bottoms).min() >= 0.1 * ax.get_figure().dpi


def test_many_numbered_groups_get_a_colour_bar_instead_of_names():
    ax = plots.lines(result(n_heads=12), group="head")
    assert "head" in drawn(ax)
    assert "head 3" not in drawn(ax)
    colours = [line.get_color() for line in ax.lines]
    assert len(set(colours)) == 12


def test_log_axis_refuses_what_it_would_hide():
    assert plots.lines(result().filter(layer=[3, 4, 5]), log=True).get_yscale() == "log"
    with pytest.raises(ValueError, match="log=True needs positive means; the smallest is -"):
        plots.lines(Result("m", pd.DataFrame({"layer": [0, 1], "value": [1.0, -1.0]}), "nats"), log=True)


def test_bars_and_their_errors_are_the_summary():
    r = result()
    ax = plots.bars(r, x="layer")
    summary = r.summary(["layer"])
    np.testing.assert_array_equal([bar.get_height() for bar in ax.patches], summary["mean"])
    ends = np.array(ax.containers[-1].lines[2][0].get_segments())[:, :, 1]
    # The error is handed over as a distance from the mean and added again.
    np.testing.assert_allclose(ends, summary[["low", "high"]], rtol=1e-12)
    assert len(plots.bars(r, x="layer", error=False).containers) == 1


def test_bars_of_groups_stand_side_by_side_in_the_tables_order():
    table = pd.DataFrame({"target": ["z", "z", "a", "a"], "component": ["q", "p"] * 2, "value": [1.0, 2.0, 3.0, 4.0]})
    ax = plots.bars(Result("m", table, "nats"), x="target", group="component")
    heights = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for bar in ax.patches}
    assert heights == {-0.2: 1.0, 0.2: 2.0, 0.8: 3.0, 1.2: 4.0}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["z", "a"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["q", "p"]


def test_scatter_points_are_the_rows_and_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"value_direct": rng.normal(size=60), "value": rng.normal(size=60), "token": [f" t{i}" for i in range(60)]}
    )
    ax = plots.scatter(Result("m", table, "logits"), x="value_direct", y="value", label="token")
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), table[["value_direct", "value"]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("direct", "logits")
    drawn(ax)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) > 5
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    named = {text.get_text(): text.xy for text in ax.texts}
    for name, point in named.items():
        np.testing.assert_array_equal(point, table.loc[int(name.removeprefix("·t")), ["value_direct", "value"]])


def test_scatter_refuses_text():
    table = pd.DataFrame({"token": ["a"], "value": [1.0]})
    with pytest.raises(ValueError, match="column 'token' is .* use bars"):
        plots.scatter(Result("m", table, "nats"), x="token", y="value")


def test_pattern_blanks_the_upper_triangle_only_of_a_causal_model():
    causal = np.tri(4) / np.arange(1, 5)[:, None]
    image = plots.pattern(causal).images[0]
    np.testing.assert_array_equal(image.get_array().mask, ~np.tri(4, dtype=bool))
    np.testing.assert_array_equal(image.get_array().compressed(), causal[np.tri(4, dtype=bool)])
    assert image.norm.vmin == 0.0
    both_ways = plots.pattern(np.full((4, 4), 0.25)).images[0]
    assert not np.ma.getmaskarray(both_ways.get_array()).any()


def test_pattern_queries_go_down_and_keys_across():
    ax = plots.pattern(np.tri(3), tokens=["a", " b", "\n"])
    assert (
        [t.get_text() for t in ax.get_xticklabels()]
        == [t.get_text() for t in ax.get_yticklabels()]
        == ["a", "·b", r"\n"]
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    low, high = ax.get_ylim()
    assert low > high  # the first query is on top


def test_pattern_refuses_what_is_not_one_heads_pattern():
    with pytest.raises(ValueError, match=r"square array; got shape \(2, 3, 3\)"):
        plots.pattern(np.ones((2, 3, 3)))
    with pytest.raises(ValueError, match="2 tokens for 3 positions"):
        plots.pattern(np.ones((3, 3)), tokens=["a", "b"])


def test_tokens_are_shaded_by_value_and_wrap_without_overlap():
    values = np.linspace(-1, 2, 80)
    ax = plots.tokens([" word"] * 80, values, unit="nats")
    assert ax.texts[0].get_text() == "·word"
    assert "nats" in drawn(ax)
    expected = mpl.colormaps["RdBu_r"](mpl.colors.Normalize(-2, 2)(values))
    np.testing.assert_allclose([p.get_facecolor() for p in ax.patches], expected)
    boxes = [p.get_window_extent() for p in ax.patches]
    assert len({round(box.y0) for box in boxes}) > 1
    for text, box in zip(ax.texts, boxes, strict=True):
        assert text.get_window_extent().width <= box.width
    starts = {(round(box.x0), round(box.y0)) for box in boxes}
    assert len(starts) == 80


def test_tokens_break_the_line_where_the_text_does():
    ax = plots.tokens(["a", "\n", "b"], [1, 2, 3], unit="nats")
    assert [text.get_position()[1] for text in ax.texts] == [0, 0, 1]


def test_tokens_need_a_value_each_and_grey_is_for_none():
    with pytest.raises(ValueError, match=r"2 tokens and values of \(3,\)"):
        plots.tokens(["a", "b"], [1, 2, 3], unit="nats")
    grey = plots.tokens(["a", "b"], [np.nan, 1.0], unit="nats").patches[0].get_facecolor()
    assert grey[:3] == pytest.approx([0.85] * 3)


def test_hostile_tokens_are_drawn_as_they_are_in_every_figure():
    shown = ["$x_{$", "_under", "·a", r"\n", "<|end|>", "%&#\\{}~^"]
    table = pd.DataFrame(
        [{"layer": layer, "token": t, "value": float(i + layer)} for layer in (0, 1) for i, t in enumerate(HOSTILE)]
    )
    r = Result("m", table, "nats")
    n = len(HOSTILE)
    for ax in (
        plots.heatmap(r, rows="token", columns="layer"),
        plots.heatmap(r, rows="layer", columns="token"),
        plots.lines(r, group="token"),
        plots.lines(r, x="token"),
        plots.bars(r, x="token"),
        plots.bars(r, x="layer", group="token"),
        plots.pattern(np.tri(n), tokens=HOSTILE),
        plots.tokens(HOSTILE, range(n), unit="nats"),
    ):
        assert set(shown) <= set(drawn(ax))
    few = plots.scatter(r.filter(layer=0), x="layer", y="value", label="token")
    assert set(drawn(few)) & set(shown)


def test_tick_labels_are_thinned_by_round_steps_before_they_touch():
    ax = plots.heatmap(result(n_layers=100, n_heads=2, n_prompts=1))
    shown = [int(t.get_text()) for t in ax.get_yticklabels()]
    step = shown[1] - shown[0]
    assert shown == list(range(0, 100, step))
    assert step in (2, 5, 10)
    drawn(ax)
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))


def test_a_single_metric_names_the_axis():
    assert plots.lines(result(metric="logit_diff")).get_ylabel() == "logit diff (logits)"


def test_long_units_are_wrapped_to_the_axes():
    label = plots.lines(result(unit="fraction of the gap between the clean and the corrupt prompt")).get_ylabel()
    assert "\n" in label


def test_missing_columns_and_empty_tables_are_named():
    for draw in (
        lambda: plots.lines(result(), x="pos"),
        lambda: plots.heatmap(result(), rows="pos"),
        lambda: plots.bars(result(), x="pos"),
    ):
        with pytest.raises(KeyError, match="no column 'pos' to draw; the table has prompt, layer, head, value"):
            draw()
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.lines(result().filter(layer=99))


def test_apart_moves_only_what_touches():
    np.testing.assert_allclose(_drawing._apart(np.array([0.0, 0.5, 0.52, 0.9]), 0.1), [0.0, 0.46, 0.56, 0.9])


def test_style_leaves_a_backend_that_turned_interactive_on():
    before = mpl.is_interactive()
    try:
        mpl.interactive(False)
        with plots.style():
            mpl.interactive(True)  # what a notebook's backend does at its first figure
        assert mpl.is_interactive()
    finally:
        mpl.interactive(before)


def test_bars_on_their_side_say_the_same():
    table = pd.DataFrame({"prompt": [0, 1, 0, 1], "component": ["a b", "a b", "c", "c"], "value": [1.0, 3.0, 5.0, 6.0]})
    result = Result("m", table, "nats")
    upright, lying = plots.bars(result, x="component"), plots.bars(result, x="component", horizontal=True)
    assert [bar.get_width() for bar in lying.patches] == [bar.get_height() for bar in upright.patches] == [2.0, 5.5]
    assert lying.get_xlabel() == upright.get_ylabel() == "nats"
    # The library's own words keep their spaces; only tokens have them shown.
    assert [label.get_text() for label in lying.get_yticklabels()] == ["a b", "c"]
    assert lying.yaxis_inverted()
