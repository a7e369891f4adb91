"""How is a token, which may be any text at all, shown safely in a figure, an HTML page or a LaTeX table?"""

from __future__ import annotations

import html
import unicodedata

#: Unicode categories that draw nothing or reorder what is around them: controls, formats (bidirectional
#: overrides, zero-width characters), surrogates, private use, unassigned, line and paragraph separators.
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")

_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "`": r"\textasciigrave{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "·": r"\textperiodcentered{}",
    **{c: "\\" + c for c in "_%&#${}"},
    # Braced, so that -- and '' make no ligature, and a cell that starts with [ or * is not taken for
    # the argument of the \\ that ends the row above.
    **{c: "{" + c + "}" for c in "-'[*"},
}


def visible(token: str) -> str:
    r"""A token with its spaces shown as "·" and its invisible characters escaped.

    Args:
        token: any text, for example " the" or "\n".

    Returns:
        The text to show: "·the", "\\n". Not escaped for any markup: see `escape_html` and `escape_latex`.
    """
    return _escape_controls(token, keep="").replace(" ", "·")


def escape_html(text: str) -> str:
    """A text that is safe inside an HTML element or a quoted attribute.

    Args:
        text: any text.

    Returns:
        The text with &, <, > and both quotes as entities, and invisible characters other than line breaks and tabs
        escaped, so that a bidirectional override cannot reorder the page.
    """
    return html.escape(_escape_controls(text, keep="\n\t"), quote=True)


def escape_latex(text: str) -> str:
    """A text that is safe in a LaTeX table cell, caption or paragraph.

    Args:
        text: any text.

    Returns:
        The text with LaTeX's special characters as commands that print them, and invisible characters escaped.
    """
    return "".join(_LATEX.get(c, c) for c in _escape_controls(text, keep=""))


def _escape_controls(text: str, *, keep: str) -> str:
    return "".join(c if c in keep or not _is_invisible(c) else _escape(c) for c in text)


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return category in _INVISIBLE or (category == "Zs" and character != " ")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
