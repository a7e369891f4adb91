"""How is HTML written? From the templates of this folder, with every value escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from interp.report.text import escape_html


@cache
def _environment() -> jinja2.Environment:
    # autoescape for every template whatever its name: a value is never markup.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _escape(value: Any) -> Any:
    # Beyond jinja's own escaping: a bidirectional override or a control character in a token must not reorder the page.
    return Markup(escape_html(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(template: str, **values: Any) -> str:
    """Fill in one of the templates of `interp/report/templates`.

    Args:
        template: its file name.
        **values: what it names; a missing one is an error.

    Returns:
        HTML in which every value is escaped.
    """
    return _environment().get_template(template).render(**values)
