"""Is every edge of a route drawn where it leads, and as wide as it is important?"""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from interp.core.result import Result
from interp.report import routes


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def result():
    rows = [
        (0, 0, 0, 2, 1, "attn", 0.25), (0, 0, 1, 2, 1, "attn", 0.5), (0, 1, 0, 3, 3, "attn", 0.125),
        (0, 1, None, 3, 3, "resid_attn", 0.75), (0, 1, None, 3, 3, "mlp", 0.4), (0, 1, None, 3, 3, "resid_mlp", 0.6),
        (1, 0, 0, 0, 0, "attn", 1.0),
    ]  # fmt: skip
    columns = ["prompt", "layer", "head", "q_pos", "k_pos", "component", "value"]
    table = pd.DataFrame(rows, columns=columns).astype({"head": "Int64"})
    return Result("flow_routes.routes", table, "share of the stream", meta={"n_layers": 3})


def drawn(ax):
    """{component: {(from, to): width}}."""
    return {
        lines.get_label(): {
            tuple(map(tuple, path.vertices.tolist())): width
            for path, width in zip(lines.get_paths(), lines.get_linewidths(), strict=True)
        }
        for lines in ax.collections[:3]
    }


def test_edges_go_from_key_to_query_half_a_layer_up_and_heads_are_summed():
    ax = routes.route(result(), tokens=["$a_{$", " b", "\n", "<d>"])
    assert drawn(ax) == {
        "attn": {((1, 0), (2, 0.5)): 4 * 0.75, ((3, 1), (3, 1.5)): 4 * 0.125},
        "resid_attn": {((3, 1), (3, 1.5)): 4 * 0.75},
        "resid_mlp": {((3, 1.5), (3, 2)): pytest.approx(4 * 0.6)},
    }
    squares = ax.collections[3]
    np.testing.assert_allclose(squares.get_offsets(), [[3, 1.75]])
    np.testing.assert_allclose(squares.get_sizes(), [12])
    assert ax.get_ylim()[1] > 3  # all layers, whether or not the route has edges there
    ax.get_figure().savefig(io.BytesIO())  # a token is only ever text


def test_axes_given_are_drawn_on_and_positions_are_numbered():
    _, (left, right) = plt.subplots(1, 2)
    assert routes.route(result(), prompt=1, ax=right) is right
    assert len(drawn(right)["attn"]) == 1
    assert not left.collections
    assert right.get_xlabel() == "position"


def test_refusals():
    with pytest.raises(ValueError, match="prompt 2 has no edges"):
        routes.route(result(), prompt=2)
    with pytest.raises(ValueError, match="3 tokens, and the prompt has edges at position 3"):
        routes.route(result(), tokens=["a", "b", "c"])
    with pytest.raises(KeyError):
        routes.route(Result("x", pd.DataFrame({"prompt": [0]}), "u"))
