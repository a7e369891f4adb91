"""What does every method return? One tidy table with its unit, its arrays and its origin."""

from __future__ import annotations

import csv
import importlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

#: The closed vocabulary of table columns; `value_*` is open. `feature` is a dimension of the
#: residual stream (or of a dictionary), `pos` a token position, `step` a training or sweep step.
COLUMNS = (
    "prompt", "layer", "head", "pos", "q_pos", "k_pos", "token", "component", "src", "dst",
    "feature", "neuron", "step", "metric", "target", "value",
)  # fmt: skip

#: Names that pandas gives to columns of text.
_TEXT = ("object", "str", "string")


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of one method on one model and one set of prompts.

    Attributes:
        method: name of the method, as registered.
        table: tidy table, one row a measured thing; columns from `COLUMNS` or `value_*`.
        unit: unit of `value`, for example "nats" or "logits".
        arrays: what is too big for a table: {name: (dimension names, array)}.
        meta: where it came from: model and task fingerprints, weight mode, options, seed, versions.
            Plain JSON types only, and no clock time, so that equal runs give equal files.
    """

    method: str
    table: pd.DataFrame
    unit: str
    arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [c for c in self.table.columns if c not in COLUMNS and not str(c).startswith("value_")]
        if unknown:
            raise ValueError(
                f"{self.method}: unknown column {unknown[0]!r}. A Result's columns are {', '.join(COLUMNS)} "
                "and value_*: rename the column, or put it in `meta`."
            )
        if not self.unit:
            raise ValueError(f'{self.method}: a Result needs the unit of its values, for example unit="logits".')
        for name, (dims, array) in self.arrays.items():
            if len(dims) != np.asarray(array).ndim:
                raise ValueError(
                    f"{self.method}: array {name!r} has {np.asarray(array).ndim} axes, but the names {dims} were given."
                )
            if np.asarray(array).dtype.hasobject or name in ("file", "allow_pickle"):  # the last two are numpy's own
                raise ValueError(
                    f"{self.method}: array {name!r} cannot be stored without pickle, or under this name: give numbers "
                    "or text, and another name."
                )
        for column in self.table.select_dtypes("object"):
            kind = pd.api.types.infer_dtype(self.table[column], skipna=True)
            if kind not in ("string", "empty"):
                raise ValueError(f"{self.method}: column {column!r} holds {kind} objects; give numbers, or text only.")
        try:
            json.dumps(dict(self.meta), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.method}: meta must hold plain JSON values only ({error}).") from None

    def __repr__(self) -> str:
        return f"<Result {self.method!r}: {len(self.table)} rows of {self.unit}; columns {list(self.table.columns)}>"

    def filter(self, **conditions: Any) -> Result:
        """Keep the rows whose columns equal the values given (or lie in the list given).

        Args:
            **conditions: column = value, or column = list of values.

        Returns:
            A new Result with the rows that meet every condition; arrays and meta unchanged.
        """
        keep = np.ones(len(self.table), dtype=bool)
        for column, wanted in conditions.items():
            self._require(column)
            listed = isinstance(wanted, (list, tuple, set, range, np.ndarray, pd.Series))
            keep &= self.table[column].isin(list(wanted) if listed else [wanted]).to_numpy()
        return replace(self, table=self.table[keep].reset_index(drop=True))

    def top(self, k: int = 10, *, by: str = "value", absolute: bool = True) -> pd.DataFrame:
        """The k rows with the largest values.

        Args:
            k: number of rows.
            by: column to rank by.
            absolute: rank by magnitude (default) rather than by signed value.

        Returns:
            A DataFrame of at most k rows, largest first; ties keep the table's order.
        """
        self._require(by)
        values = self.table[by].abs() if absolute else self.table[by]
        order = values.reset_index(drop=True).sort_values(ascending=False, kind="stable").index[:k]
        return self.table.iloc[order].reset_index(drop=True)

    def grid(self, rows: str, columns: str, *, value: str = "value") -> pd.DataFrame:
        """The table as a matrix, cells averaged over everything else.

        Args:
            rows: column whose values become the rows.
            columns: column whose values become the columns.
            value: column to average.

        Returns:
            A DataFrame indexed by `rows`, with one column for each value of `columns`.
        """
        for column in (rows, columns, value):
            self._require(column)
        return self.table.pivot_table(index=rows, columns=columns, values=value, aggfunc="mean")

    def summary(
        self, by: Sequence[str] = (), *, value: str = "value", seed: int = 0, n_boot: int = 1000, level: float = 0.95
    ) -> pd.DataFrame:
        """Mean, standard error and bootstrap interval of each group, over prompts.

        Rows of one prompt are averaged first, because they are not independent; the bootstrap then
        resamples prompts. Without a `prompt` column each row counts as independent.

        Args:
            by: columns that define the groups; none for one group.
            value: column to summarise.
            seed: seed of the bootstrap.
            n_boot: number of bootstrap resamples.
            level: coverage of the percentile interval.

        Returns:
            A DataFrame with the columns of `by`, then `n`, `mean`, `se`, `low`, `high`, in the unit of the Result; no
            rows for an empty table.
        """
        for column in [*by, value]:
            self._require(column)
        table = self.table
        if "prompt" in table.columns and "prompt" not in by:
            table = table.groupby([*by, "prompt"], sort=True, dropna=False)[value].mean().reset_index()
        groups = table.groupby(list(by), sort=True, dropna=False) if by else [((), table)] if len(table) else []
        rows = []
        for key, group in groups:
            values = group[value].to_numpy(dtype=float)
            # A generator per group: the interval of a group does not depend on which others are asked for.
            generator = np.random.default_rng(seed)
            at_once = max(1, 1_000_000 // len(values))  # bounds the memory, whatever the number of rows
            sizes = [min(at_once, n_boot - done) for done in range(0, n_boot, at_once)]
            draws = (generator.integers(len(values), size=(size, len(values))) for size in sizes)
            means = np.concatenate([values[drawn].mean(axis=1) for drawn in draws])
            low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
            spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
            rows.append([*key, len(values), values.mean(), spread, low, high])
        return pd.DataFrame(rows, columns=[*by, "n", "mean", "se", "low", "high"])

    def plot(self, kind: str = "lines", **options: Any) -> Any:
        """Draw the table with `interp.report.plots`.

        Args:
            kind: name of the plotting function there: "heatmap", "lines", "bars" or "scatter", or "top_tokens".
            **options: handed on to it, for example x="layer", y="value", ax=ax.

        Returns:
            The matplotlib Axes drawn on.
        """
        # Drawing is a later room; it is looked up by name at call time, as pandas does with its plotting backends.
        plots = importlib.import_module("interp.report.plots")
        if kind not in plots.RESULT_KINDS:
            raise ValueError(f"plot kind {kind!r} is not known; use one of {', '.join(plots.RESULT_KINDS)}.")
        return plots.RESULT_KINDS[kind](self, **options)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `table.csv`, `arrays.npz` and `result.json` into a folder, replacing a Result there.

        Args:
            folder: created if it is missing.

        Returns:
            The folder's path. Equal Results give byte-identical files.

        Raises:
            OSError: the folder cannot be written; a Result that was there is as it was.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".result-", dir=folder) as unfinished:
                self._write(Path(unfinished))
                for file in sorted(Path(unfinished).iterdir()):
                    os.replace(file, folder / file.name)
        except OSError as error:
            raise OSError(
                f"{self.method}: the Result cannot be written to {folder} ({error}). Nothing there has changed: free "
                "some space or choose another folder, and save again."
            ) from error
        return folder

    def _write(self, folder: Path) -> None:
        text = [c for c, t in self.table.dtypes.items() if str(t) in _TEXT]
        head = {
            "method": self.method,
            "unit": self.unit,
            "meta": dict(self.meta),
            "dims": {name: list(dims) for name, (dims, _) in self.arrays.items()},
            "dtypes": {str(c): str(t) for c, t in self.table.dtypes.items()},
            # In the CSV a missing text and an empty one look alike.
            "missing": {c: [int(i) for i in np.flatnonzero(self.table[c].isna())] for c in text},
        }
        # Text is quoted: a token may be a carriage return, or empty.
        quoting = csv.QUOTE_NONNUMERIC
        self.table.to_csv(folder / "table.csv", index=False, lineterminator="\n", quoting=quoting)
        arrays = {name: np.asarray(array) for name, (_, array) in sorted(self.arrays.items())}
        np.savez_compressed(folder / "arrays.npz", **arrays)
        (folder / "result.json").write_text(json.dumps(head, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Result:
        """Read what `save` wrote.

        Args:
            folder: a folder that `save` wrote.

        Returns:
            An equal Result.
        """
        folder = Path(folder)
        if not (folder / "result.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no saved Result (no result.json). Give the folder that Result.save wrote."
            )
        head = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        # keep_default_na=False: a token such as "NA" or "null" is text, not a missing value.
        text = list(head["missing"])
        table = pd.DataFrame()
        if head["dtypes"]:
            table = pd.read_csv(
                folder / "table.csv",
                dtype={c: str for c in text},
                keep_default_na=False,
                na_values={c: [""] for c in head["dtypes"] if c not in text},
                float_precision="round_trip",
            )
        for column, rows in head["missing"].items():
            table.loc[rows, column] = None
        table = table.astype(head["dtypes"])
        with np.load(folder / "arrays.npz", allow_pickle=False) as stored:
            arrays = {name: (tuple(dims), stored[name]) for name, dims in head["dims"].items()}
        return cls(head["method"], table, head["unit"], arrays, head["meta"])

    def _require(self, column: str) -> None:
        if column not in self.table.columns:
            raise KeyError(
                f"{self.method}: no column {column!r}; this Result has {', '.join(map(str, self.table.columns))}."
            )
