"""What is a page of its own? HTML that needs no other file: its data are inside it, its one script allowed by its hash.

The script writes every token as text, so that no token can be markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from interp.report import _tidy
from interp.report._templates import render


@dataclass(frozen=True)
class Page:
    """A page of its own, which a notebook shows in a frame.

    Attributes:
        title: what the frame is called.
        text: the page's HTML, whole.
    """

    title: str
    text: str = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        # In a frame of its own: neither its style nor its script meets the notebook's.
        return (
            f'<iframe title="{html.escape(self.title, quote=True)}" sandbox="allow-scripts" '
            'style="width:100%;height:760px;border:1px solid '
            f'#d9dde2" srcdoc="{html.escape(self.text, quote=True)}"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all.

        Args:
            path: the file.

        Returns:
            Its path.

        Raises:
            OSError: when it cannot be written.
        """
        target = Path(path).expanduser()
        _tidy.replace_text(target, self.text)
        return target


def page(name: str, title: str, data: Mapping[str, Any], **values: Any) -> Page:
    """A page from `templates/NAME.html.j2` and `templates/NAME.js`.

    Args:
        name: of the two files.
        title: what a notebook's frame is called.
        data: what the script reads, JSON types only.
        **values: what the template names beside `data`, `script` and `digest`.

    Returns:
        The Page.
    """
    # "<" is written as an escape, so that no token can end the element that the data are in.
    written = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", r"\u003c")
    script = _script(name)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return Page(title, render(f"{name}.html.j2", data=Markup(written), script=Markup(script), digest=digest, **values))


@cache
def _script(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.js").read_text(encoding="utf-8")
