"""Does a Result keep what it was given, through every method and through the disk?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interp.core.result import COLUMNS, Result

matplotlib.use("Agg")

# Everything that a CSV reader likes to read as something else.
HOSTILE = [
    "NA", "nan", "null", "None", "", " ", "\r", "\n", "\r\n", "\t", ",", '"', '""', "'", "\\", "\\n", "#", "0", "1e5",
    "-", "True", "🙂", "é", "e\u0301", "\u2028", "\x00", "\x1b[31m", "Ġthe", "�", "=1+1", "; ", "<script>",
]  # fmt: skip


def table(**columns: Any) -> Result:
    return Result("test", pd.DataFrame(columns), "nats", meta={"model": "toy"})


def two_prompts() -> Result:
    rng = np.random.default_rng(0)
    grid = [(p, layer, h) for p in range(2) for layer in range(3) for h in range(4)]
    prompt, layer, head = (list(c) for c in zip(*grid, strict=True))
    return table(prompt=prompt, layer=layer, head=head, value=rng.normal(size=24))


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_unknown_column_is_named_with_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"test: unknown column 'score'.*prompt, layer, head.*value_\*"):
        table(layer=[1], score=[0.5])
    assert table(**{name: [0] for name in COLUMNS}, value_low=[0.1]).table.shape == (1, len(COLUMNS) + 1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"unit": ""}, "needs the unit"),
        ({"arrays": {"a": (("layer", "head"), np.zeros(3))}}, r"array 'a' has 1 axes, .*\('layer', 'head'\)"),
        ({"arrays": {"a": (("layer",), np.array([{}]))}}, "array 'a' cannot be stored without pickle"),
        ({"arrays": {"file": (("layer",), np.zeros(3))}}, "array 'file' cannot be stored"),
        ({"meta": {"a": np.zeros(2)}}, "meta must hold plain JSON"),
        ({"meta": {"a": float("nan")}}, "meta must hold plain JSON"),
        ({"table": pd.DataFrame({"token": ["a", 1]})}, "column 'token' holds mixed-integer objects"),
    ],
)
def test_what_cannot_be_kept_is_refused(change: dict[str, Any], complaint: str) -> None:
    given = {"method": "test", "table": pd.DataFrame({"value": [1.0]}), "unit": "nats"}
    Result(**given)
    with pytest.raises(ValueError, match=complaint):
        Result(**{**given, **change})


def test_repr_says_what_is_inside() -> None:
    assert repr(two_prompts()) == "<Result 'test': 24 rows of nats; columns ['prompt', 'layer', 'head', 'value']>"


def test_filter_by_value_and_by_list() -> None:
    result = two_prompts()
    kept = result.filter(layer=1, head=[0, 3])
    assert kept.table[["layer", "head"]].drop_duplicates().to_numpy().tolist() == [[1, 0], [1, 3]]
    assert len(kept.table) == 4
    assert list(kept.table.index) == [0, 1, 2, 3]
    assert kept.meta == result.meta
    assert len(result.table) == 24  # the original is as it was
    assert len(result.filter(head=range(2)).table) == 12
    assert len(result.filter(layer=99).table) == 0
    with pytest.raises(KeyError, match="test: no column 'haed'; this Result has prompt, layer, head, value"):
        result.filter(haed=1)


def test_top_ranks_by_magnitude_and_keeps_the_order_of_ties() -> None:
    result = table(pos=[0, 1, 2, 3, 4], value=[1.0, -5.0, 5.0, float("nan"), 2.0])
    assert result.top(3)["pos"].tolist() == [1, 2, 4]
    assert result.top(2, absolute=False)["pos"].tolist() == [2, 4]
    assert result.top(99)["pos"].tolist() == [1, 2, 4, 0, 3]
    with pytest.raises(KeyError, match="no column 'value_z'"):
        result.top(by="value_z")


def test_top_counts_rows_where_labels_of_rows_repeat() -> None:
    # Tables put together with pd.concat often have such an index.
    frame = pd.DataFrame({"pos": [0, 1, 2], "value": [3.0, 2.0, 1.0]}, index=[2, 2, 0])
    assert Result("test", frame, "nats").top(1)["pos"].tolist() == [0]


def test_grid_averages_over_what_it_does_not_show() -> None:
    result = two_prompts()
    grid = result.grid("layer", "head")
    cube = result.table["value"].to_numpy().reshape(2, 3, 4)
    np.testing.assert_allclose(grid.to_numpy(), cube.mean(0), rtol=1e-14)  # one float64 addition
    assert (grid.index.name, grid.columns.name, grid.shape) == ("layer", "head", (3, 4))
    with pytest.raises(KeyError, match="no column 'step'"):
        result.grid("layer", "step")


def test_summary_is_numpys() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=40)
    (row,) = table(prompt=range(40), value=values).summary(seed=5, n_boot=500).itertuples()
    # float64 sums in another order
    assert row.n == 40
    assert row.mean == pytest.approx(values.mean(), rel=1e-12)
    assert row.se == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=1e-12)
    draws = np.random.default_rng(5).integers(40, size=(500, 40))
    assert [row.low, row.high] == pytest.approx(np.quantile(values[draws].mean(1), [0.025, 0.975]), rel=1e-12)


def test_summary_resamples_prompts_not_rows() -> None:
    # Ten rows a prompt that say the same ten times: no more is known than from one row a prompt.
    values = np.random.default_rng(2).normal(size=12)
    once = table(prompt=range(12), value=values).summary()
    tenfold = table(prompt=np.repeat(range(12), 10), value=np.repeat(values, 10)).summary()
    np.testing.assert_allclose(tenfold.to_numpy(), once.to_numpy(), rtol=1e-12)
    independent = table(value=np.repeat(values, 10)).summary()
    assert independent["n"].item() == 120
    assert independent["se"].item() < 0.4 * once["se"].item()  # about sqrt(1/10)


def test_summary_of_groups_does_not_depend_on_the_other_groups() -> None:
    result = two_prompts()
    both = result.summary(by=["layer", "head"], seed=3)
    assert both.shape == (12, 7)
    alone = result.filter(layer=1, head=2).summary(by=["layer", "head"], seed=3)
    pd.testing.assert_frame_equal(both[(both.layer == 1) & (both["head"] == 2)].reset_index(drop=True), alone)
    pd.testing.assert_frame_equal(both, result.summary(by=["layer", "head"], seed=3))
    assert not both["low"].equals(result.summary(by=["layer", "head"], seed=4)["low"]) or both["n"].max() < 3
    one = result.filter(prompt=0).summary(by=["layer", "head"])
    assert one["se"].isna().all()  # one prompt has no spread
    with pytest.raises(KeyError, match="no column 'step'"):
        result.summary(by=["step"])


def test_bootstrap_depends_on_its_seed_and_on_nothing_else() -> None:
    result = table(prompt=range(30), value=np.random.default_rng(7).normal(size=30))
    np.random.default_rng().normal()
    assert result.summary(seed=0)["low"].item() == result.summary(seed=0)["low"].item()
    assert result.summary(seed=0)["low"].item() != result.summary(seed=1)["low"].item()
    wide, narrow = result.summary(level=0.99), result.summary(level=0.5)
    assert wide["low"].item() < narrow["low"].item() < narrow["high"].item() < wide["high"].item()


def test_bootstrap_in_blocks_equals_the_bootstrap_at_once() -> None:
    # 3000 values and 400 resamples are more than the million draws that are made at once.
    values = np.random.default_rng(3).normal(size=3000)
    row = table(value=values).summary(n_boot=400)
    draws = np.random.default_rng(0).integers(3000, size=(400, 3000))
    expected = np.quantile(values[draws].mean(1), [0.025, 0.975])
    assert row[["low", "high"]].to_numpy()[0] == pytest.approx(expected, rel=1e-12)


def test_summary_of_no_rows_has_no_rows() -> None:
    empty = two_prompts().filter(layer=99)
    assert list(empty.summary().columns) == ["n", "mean", "se", "low", "high"]
    assert len(empty.summary()) == len(empty.summary(by=["head"])) == 0


def test_plot_draws_the_table_and_refuses_an_unknown_kind() -> None:
    result = two_prompts()
    axes = result.plot("lines", x="layer", y="value")
    assert axes.get_ylabel()
    with pytest.raises(ValueError, match="plot kind 'pie' is not known; use one of .*lines"):
        result.plot("pie")


def test_round_trip_keeps_hostile_text_numbers_arrays_and_meta(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "prompt": np.arange(len(HOSTILE)),
            "token": HOSTILE,
            "value": np.linspace(-1, 1, len(HOSTILE)) / 3,
            "value_single": np.linspace(0, 1, len(HOSTILE), dtype=np.float32) / 3,
        }
    )
    frame.loc[0, "value"], frame.loc[1, "value"], frame.loc[2, "value"] = float("nan"), float("inf"), -1e-310
    arrays = {
        "pattern": (("q_pos", "k_pos"), np.random.default_rng(0).random((3, 3)).astype(np.float32)),
        "names": (("token",), np.array(["a", "b\n"])),
    }
    meta = {"model": "toy", "options": {"k": 3, "what": ["\r", None, True, 0.1]}}
    saved = Result("a method", frame, "logits", arrays, meta)
    found = Result.load(saved.save(tmp_path / "new" / "folder"))
    pd.testing.assert_frame_equal(found.table, frame, check_exact=True)
    assert (found.method, found.unit, found.meta) == ("a method", "logits", meta)
    for name, (dims, array) in arrays.items():
        assert found.arrays[name][0] == dims
        np.testing.assert_array_equal(found.arrays[name][1], array, strict=True)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"token": ["a", None, ""], "value": [1.0, 2.0, 3.0]}),
        pd.DataFrame({"token": pd.Series(["a", None, ""], dtype=object), "value": [1, 2, 3]}),
        pd.DataFrame({"token": pd.Series([], dtype=str), "layer": pd.Series([], dtype=int)}),
        pd.DataFrame({"token": ["", "", ""]}),
        pd.DataFrame(),
        pd.DataFrame({"value": [True, False]}),
        pd.DataFrame({"pos": pd.array([1, None], dtype="Int64"), "value": [0.1, 0.2]}),
        pd.DataFrame({"value": np.array([2**62 + 1, -1])}),
    ],
    ids=["missing text", "missing in objects", "no rows", "empty text", "no columns", "bool", "nullable", "long"],
)
def test_round_trip_at_the_edges(frame: pd.DataFrame, tmp_path: Path) -> None:
    found = Result.load(Result("test", frame, "nats").save(tmp_path)).table
    pd.testing.assert_frame_equal(found, frame, check_exact=True)


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\r\n,"\x00'), max_size=6)
ROWS = st.lists(st.tuples(TEXT, st.floats(), st.integers(-(2**63), 2**63 - 1)), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_round_trip_of_anything(rows: list[tuple[str, float, int]], tmp_path: Path) -> None:
    frame = pd.DataFrame(rows, columns=["token", "value", "step"]).astype(
        {"token": str, "value": float, "step": "int64"}
    )
    found = Result.load(Result("test", frame, "nats").save(tmp_path)).table
    pd.testing.assert_frame_equal(found, frame, check_exact=True)


def test_equal_results_give_the_same_bytes(tmp_path: Path) -> None:
    def made() -> Result:
        arrays = {"b": (("pos",), np.arange(3.0)), "a": (("pos",), np.ones(2))}
        return Result("test", two_prompts().table.assign(token="\r"), "nats", arrays, {"z": 1, "a": 2})

    first, again = made().save(tmp_path / "first"), made().save(tmp_path / "again")
    assert list(read(first)) == ["arrays.npz", "result.json", "table.csv"]
    assert read(first) == read(again)
    assert read(Result.load(first).save(tmp_path / "third")) == read(first)
    reordered = Result("test", made().table, "nats", dict(reversed(made().arrays.items())), {"a": 2, "z": 1})
    assert read(reordered.save(tmp_path / "fourth")) == read(first)
    assert made().save(first) == first
    assert read(first) == read(again)  # saved over itself


def test_nothing_in_a_saved_result_needs_pickle(tmp_path: Path) -> None:
    arrays = {"a": (("pos",), np.array(["text", "more"]))}
    Result("test", pd.DataFrame({"token": ["x", None]}), "nats", arrays).save(tmp_path)
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as stored:
        assert stored["a"].tolist() == ["text", "more"]


def test_loading_another_folder_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no saved Result \(no result.json\).*Result.save wrote"):
        Result.load(tmp_path)


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    # Under a file, because a superuser may write where others may not.
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot be written to .*file.results.*choose another folder"):
        two_prompts().save(tmp_path / "file" / "results")


def test_a_full_disk_leaves_the_old_result_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = two_prompts()
    before = read(old.save(tmp_path))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)  # the second of the three files
    with pytest.raises(OSError, match="No space left on device.*Nothing there has changed"):
        old.filter(layer=0).save(tmp_path)
    assert read(tmp_path) == before  # and no unfinished file beside it


def test_saved_meta_is_readable_json(tmp_path: Path) -> None:
    two_prompts().save(tmp_path)
    head = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (head["method"], head["unit"], head["meta"]) == ("test", "nats", {"model": "toy"})
