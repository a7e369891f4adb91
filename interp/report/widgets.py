"""How is attention or a text looked through by hand? circuitsvis in the notebook, without a network.

circuitsvis's own HTML asks google.com whether there is a network and then loads its script from unpkg.com. The HTML
made here holds the script that the installed package ships (1.3 MB), so a notebook or page that is sent on still
works, looks nothing up, and is the same text for the same data.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import circuitsvis
import numpy as np
from circuitsvis.utils.render import RenderedHTML

from interp.report.text import visible

#: Significant digits kept of the largest value; the rest is weight in the page that no eye can use.
DIGITS = 4


class Widget(RenderedHTML):
    """circuitsvis's rendered HTML that is shown as it is, without asking the network first."""

    def _repr_html_(self) -> str:
        return self.local_src


def attention(str_tokens: Sequence[str], patterns: Any, *, head_names: Sequence[str] | None = None) -> Widget:
    """Attention patterns of several heads, to click through and hover over.

    Args:
        str_tokens: the text of each position.
        patterns: `[head q_pos k_pos]`, an array or a CPU tensor. The upper triangle is hidden where it is all zeros
            in every head (a causal model's).
        head_names: one name a head, for example "5.1"; None numbers them.

    Returns:
        The widget; a notebook shows it when it is a cell's last line, and `str(widget)` is its HTML (1.3 MB and
        about 6 bytes a number).

    Raises:
        ValueError: for shapes that do not fit together, or values that are not finite.
    """
    values = np.asarray(patterns, dtype=float)
    n = len(str_tokens)
    if values.ndim != 3 or values.shape[1:] != (n, n):
        raise ValueError(f"attention needs [head q_pos k_pos] with {n} positions, one a token; got {values.shape}.")
    if head_names is not None and len(head_names) != len(values):
        raise ValueError(f"attention got {len(head_names)} head names for {len(values)} heads.")
    causal = not np.any(np.triu(values, k=1))
    names = {} if head_names is None else {"attentionHeadNames": [visible(name) for name in head_names]}
    props = {"tokens": [visible(token) for token in str_tokens], "attention": _rounded(values), "maskUpperTri": causal}
    return _widget("AttentionHeads", props | names)


def colored_tokens(str_tokens: Sequence[str], values: Any) -> Widget:
    """A text with each token shaded by its value, which shows when hovered over.

    Args:
        str_tokens: the text of each token.
        values: `[pos]`, an array or a CPU tensor.

    Returns:
        The widget; a notebook shows it when it is a cell's last line, and `str(widget)` is its HTML (1.3 MB).

    Raises:
        ValueError: for another number of values than tokens, or values that are not finite.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.shape != (len(str_tokens),):
        raise ValueError(f"colored_tokens needs one value for each of {len(str_tokens)} tokens; got {numbers.shape}.")
    return _widget("ColoredTokens", {"tokens": [_inert(visible(t)) for t in str_tokens], "values": _rounded(numbers)})


def _inert(text: str) -> str:
    """A text that reads the same as HTML and as plain text.

    ColoredTokens sets a token as HTML in the line and as text in its tooltip, so an entity would be read in one of
    them. A word joiner, which takes no room, after each < and & keeps them from opening a tag or an entity in HTML.
    """
    return re.sub("[<&]", "\\g<0>\u2060", text)


def _rounded(values: np.ndarray) -> list:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{len(bad)} values are not finite, the first at index {tuple(map(int, bad[0]))}: find where the model "
            "overflowed before looking at it."
        )
    largest = float(np.abs(values).max(initial=0.0))
    decimals = DIGITS - 1 - int(np.floor(np.log10(largest))) if largest > 0 else 0
    return np.round(values, decimals).tolist()


def _widget(element: str, props: dict[str, Any]) -> Widget:
    # "<" is written as an escape, so that no token can end the script or open a comment in it.
    written = json.dumps(props, allow_nan=False).replace("<", r"\u003c")
    name = hashlib.sha256(f"{element}{written}".encode()).hexdigest()[:16]
    # The element gets its id in the browser: the same widget may stand twice on one page.
    html = f"""<div data-circuitsvis="{name}" style="margin: 15px 0;"></div>
<script type="module">
{_script()}
const place = document.querySelector('[data-circuitsvis="{name}"]');
place.removeAttribute("data-circuitsvis");
place.id = "circuitsvis-" + Math.random().toString(36).slice(2);
CircuitsVis.render(place.id, CircuitsVis.{element}, {written});
</script>
"""
    return Widget(html, html)


@functools.cache
def _script() -> str:
    """The JavaScript that the installed circuitsvis ships, fit to stand inside a page."""
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    script = path.read_text(encoding="utf-8")
    # Inside a JavaScript string "<\/script" is the same text, but does not end the script element.
    script = re.sub("</(script)", r"<\\/\1", script, flags=re.IGNORECASE)
    return re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.MULTILINE).rstrip()
