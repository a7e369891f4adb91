"""Which of a paper's claims did this run reproduce? Published beside measured, by criteria fixed in advance.

Each paper has a file `data/papers/<key>/claims.csv`: a few comment lines (`# title: ...`, `# paper: arXiv:...`, and
notes), then one row a claim. A claim says what the paper states and where, what the paper measured on which model
(with a tag for where that number was read), what is measured here, and two criteria written down before the run.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp.core import places
from interp.report._criteria import parse_criterion
from interp.report._templates import render

if TYPE_CHECKING:
    from interp.models.model import Model

#: Columns of a claims.csv, in this order.
COLUMNS = (
    "id", "statement", "where", "paper_model", "paper_value", "tag", "quantity", "reproduced", "partly",
)  # fmt: skip
#: The four verdicts, best first.
VERDICTS = ("reproduced", "partly", "not reproduced", "not testable")
#: Key under which a notebook's output carries the claims as JSON.
MIME = "application/vnd.interp.claims+json"


@dataclass(frozen=True)
class Untestable:
    """Stands in `check`'s `measured` for a claim that this run cannot test. Made by `untestable`."""

    why: str


def untestable(why: str) -> Untestable:
    """Say that a claim cannot be tested on this model, and why.

    Args:
        why: the reason, for example "SmolLM2 has no vision encoder".

    Returns:
        A marker to pass to `check` in place of a number.
    """
    if not why.strip():
        raise ValueError("untestable() needs the reason: it is what the reader of the report sees instead of a number.")
    return Untestable(why.strip())


@dataclass(frozen=True, eq=False)
class Claims:
    """A paper's claims beside what one run measured.

    Attributes:
        key: the paper's key, the folder name under `data/papers`.
        title: the paper's title.
        paper: its identifier, `arXiv:NNNN.NNNNN`.
        model: provenance of the model measured: name, fingerprint, weight mode, dtype, device.
        conditions: under which conditions, in words (prompts, lengths, seed).
        notes: further comment lines of the claims file, for example what the tags mean.
        table: one row a claim: the columns of the file, then `measured` (NaN when not testable), `verdict`, `why`.
    """

    key: str
    title: str
    paper: str
    model: Mapping[str, str]
    conditions: str
    notes: tuple[str, ...]
    table: pd.DataFrame

    @property
    def counts(self) -> dict[str, int]:
        """How many claims got each verdict, in the order of `VERDICTS`, zeros included."""
        found = self.table["verdict"].tolist()
        return {verdict: found.count(verdict) for verdict in VERDICTS}

    def rows(self) -> list[dict[str, Any]]:
        """The table as one dict a claim, with `shown`: the measured number as text, or a dash."""
        records = self.table.to_dict("records")
        return [{str(k): v for k, v in record.items()} | {"shown": _shown(record)} for record in records]

    def to_json(self) -> dict[str, Any]:
        """The claims as plain JSON values; `from_json` reads them back.

        Returns:
            A dict; a claim that was not testable has `measured` null.
        """
        rows = [{k: v for k, v in row.items() if k != "shown"} for row in self.rows()]
        for row in rows:
            row["measured"] = None if math.isnan(row["measured"]) else float(row["measured"])
        return {
            "key": self.key,
            "title": self.title,
            "paper": self.paper,
            "model": dict(self.model),
            "conditions": self.conditions,
            "notes": list(self.notes),
            "rows": rows,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Claims:
        """Read what `to_json` wrote.

        Args:
            stored: the dict.

        Returns:
            Equal claims.

        Raises:
            ValueError: when it is not such a dict.
        """
        columns = [*COLUMNS, "measured", "verdict", "why"]
        try:
            table = pd.DataFrame([[row[c] for c in columns] for row in stored["rows"]], columns=columns)
            table["measured"] = table["measured"].astype(float)
            claims = cls(
                **{name: str(stored[name]) for name in ("key", "title", "paper", "conditions")},
                model={str(k): str(v) for k, v in stored["model"].items()},
                notes=tuple(map(str, stored["notes"])),
                table=table,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a claims record of interp ({error!r}): rerun the notebook.") from None
        if unknown := set(table["verdict"]) - set(VERDICTS):
            raise ValueError(f"claims of {claims.key!r}: verdict {sorted(unknown)[0]!r} is not one of {VERDICTS}.")
        return claims

    def __repr__(self) -> str:
        tally = ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n)
        lines = [f"{self.title} ({self.paper}) on {self.model.get('model', 'an unnamed model')}: {tally}"]
        lines += [f"conditions: {self.conditions}"] if self.conditions else []
        for row in self.rows():
            lines.append(f"[{row['verdict']}] {row['id']}: {row['statement']} ({row['where']})")
            lines.append(f"    {row['quantity']}: {row['why']}")
            lines.append(f"    published: {row['paper_value']} on {row['paper_model']} [{row['tag']}]")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return render("claims_output.html.j2", claims=self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return {"text/plain": repr(self), "text/html": self._repr_html_(), MIME: self.to_json()}


def read(key: str) -> tuple[dict[str, str], tuple[str, ...], pd.DataFrame]:
    """Read a paper's claims file and check that every row of it can be judged.

    Args:
        key: folder name under `data/papers`.

    Returns:
        `({"title": ..., "paper": ...}, notes, table)`; the table has the columns `COLUMNS`, all text.

    Raises:
        ValueError: for a key that has no claims file (the nearest are named), or a file with missing columns, missing
            origin lines, no rows, a repeated id, an empty cell or a criterion that cannot be read.
    """
    folder = places.shipped("data") / "papers"
    path = folder / key / "claims.csv"
    if not path.is_file():
        known = sorted(p.parent.name for p in folder.glob("*/claims.csv"))
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        raise ValueError(
            f"no paper {key!r}: data/papers/{key}/claims.csv is missing. Nearest: {', '.join(near) or 'none'}."
        )
    origin, notes, body = _split_header(path)
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(body), strict=True) if row]
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}.") from None
    if header != list(COLUMNS):
        raise ValueError(f"{path}: the columns must be {','.join(COLUMNS)}; they are {','.join(header)}.")
    if not rows:
        raise ValueError(f"{path} has no claims: add one row a claim below the line of column names.")
    for row in rows:
        _check_row(path, row)
    table = pd.DataFrame(rows, columns=header)
    ids = table["id"].tolist()
    if repeated := [name for name in ids if ids.count(name) > 1]:
        raise ValueError(f"{path}: claim id {repeated[0]!r} is used twice.")
    return origin, notes, table


def check(key: str, measured: Mapping[str, Any], *, model: Model, conditions: str = "") -> Claims:
    """Set what this run measured beside a paper's claims, and give each its verdict.

    A claim is "reproduced" when the number meets the row's `reproduced` criterion, "partly" when it meets only
    `partly`, else "not reproduced". "not testable" is for `untestable(why)`. Nothing is left out in silence.

    Args:
        key: folder name under `data/papers`.
        measured: {claim id: number in the unit that the row's `quantity` names, or `untestable(why)`}.
        model: the model measured.
        conditions: under which conditions, in words, for example "64 prompts of 128 tokens, seed 0".

    Returns:
        The claims with their verdicts. As the last value of a notebook cell they also carry themselves as JSON,
        which is how the report collects them.

    Raises:
        ValueError: for a claim without a measurement, a measurement without a claim, or one that is not a finite
            number. A NaN is a failed measurement, not a claim that failed.
    """
    origin, notes, table = read(key)
    ids = list(table["id"])
    for name in measured:
        if name not in ids:
            near = difflib.get_close_matches(str(name), ids, n=3, cutoff=0.4) or ids
            raise ValueError(f"{key}: no claim {name!r} in its claims.csv. Nearest: {', '.join(near)}.")
    for name in ids:
        if name not in measured:
            raise ValueError(
                f"{key}: claim {name!r} was not measured. Add it to `measured`: a number, or claims.untestable(why)."
            )
    judged = [_judge(key, row, measured[str(row["id"])]) for row in table.to_dict("records")]
    return Claims(
        key=key,
        title=origin["title"],
        paper=origin["paper"],
        model={**model.provenance, "device": str(model.device)},
        conditions=conditions,
        notes=notes,
        table=pd.concat([table, pd.DataFrame(judged, columns=["measured", "verdict", "why"])], axis=1),
    )


def _split_header(path: Path) -> tuple[dict[str, str], tuple[str, ...], str]:
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    size = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comments = [line[1:].strip() for line in lines[:size]]
    origin = {}
    for name in ("title", "paper"):
        found = [c.removeprefix(f"{name}:").strip() for c in comments if c.startswith(f"{name}:")]
        if len(found) != 1 or not found[0]:
            raise ValueError(f"{path}: needs one line '# {name}: ...' above the table, with the paper's {name} in it.")
        origin[name] = found[0]
    notes = tuple(c for c in comments if c and not c.startswith(("title:", "paper:")))
    return origin, notes, "".join(lines[size:])


def _check_row(path: Path, cells: list[str]) -> None:
    name = cells[0]
    if len(cells) != len(COLUMNS):
        raise ValueError(
            f"{path}: the row of claim {name!r} has {len(cells)} cells, not {len(COLUMNS)}: quote cells with commas."
        )
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"{path}: claim id {name!r} may have only letters, digits, '_', '-' and '.': it becomes a link."
        )
    row = dict(zip(COLUMNS, cells, strict=True))
    for column in COLUMNS:
        if not row[column].strip() and column != "partly":
            raise ValueError(f"{path}: claim {name!r} has an empty {column!r}; only 'partly' may be empty.")
    try:
        for column in ("reproduced", "partly"):
            if row[column].strip():
                parse_criterion(row[column])
    except ValueError as error:
        raise ValueError(f"{path}: claim {name!r}: {error}") from None


def _judge(key: str, row: Mapping[Any, Any], value: Any) -> tuple[float, str, str]:
    if isinstance(value, Untestable):
        return float("nan"), "not testable", value.why
    if isinstance(value, (str, bytes)):
        raise ValueError(
            f"{key}: claim {row['id']!r} was given the text {value!r}; give a number, or claims.untestable({value!r})."
        )
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: claim {row['id']!r} needs one number; got {type(value).__name__}.") from None
    if not math.isfinite(number):
        raise ValueError(
            f"{key}: claim {row['id']!r} was measured as {number}. That is a failed measurement: find where it comes "
            "from, or say claims.untestable(why)."
        )
    wanted, partly = row["reproduced"].strip(), row["partly"].strip()
    shown = _shown({**row, "measured": number})
    if parse_criterion(wanted).holds(number):
        return number, "reproduced", f"{shown} meets {wanted}"
    if partly and parse_criterion(partly).holds(number):
        return number, "partly", f"{shown} misses {wanted} but meets {partly}"
    return number, "not reproduced", f"{shown} misses {wanted}" + (f" and {partly}" if partly else "")


def _shown(row: Mapping[Any, Any]) -> str:
    """The measured number, with as many digits as the reader needs to come to the same verdict."""
    value = row["measured"]
    if math.isnan(value):
        return "–"
    criteria = [parse_criterion(row[c]) for c in ("reproduced", "partly") if row[c].strip()]
    texts = (_plain(f"{value:.{digits}g}") for digits in range(4, 17))
    faithful = (text for text in texts if all(c.holds(float(text)) == c.holds(value) for c in criteria))
    return next(faithful, repr(value))


def _plain(text: str) -> str:
    """A number without an exponent where that is as short: 13890 rather than 1.389e+04."""
    return np.format_float_positional(float(text), trim="-") if 1 <= abs(float(text)) < 1e7 else text
