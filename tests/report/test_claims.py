"""Are verdicts what the criteria say, and is nothing left out in silence?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.core import places
from interp.report import claims
from interp.report._criteria import parse_criterion

MODEL = SimpleNamespace(provenance={"model": "toy", "model_fingerprint": "ab" * 32}, device="cpu")
HEADER = "id,statement,where,paper_model,paper_value,tag,quantity,reproduced,partly\n"
ORIGIN = "# title: Big Entries\n# paper: arXiv:2402.17762\n# tag code: read in the repository\n"
ROWS = (
    'size,"Large, and few",Sec. 2,LLaMA2-7B,2622,code,ratio,>= 1000,>= 300\n'
    'dims,In fixed dimensions,Fig. 2,LLaMA2-7B,2,3p,number of dimensions,"in [1, 3]",\n'
    "vit,In vision models too,Sec. 5,DINOv2,yes,recall,ratio,>= 1000,\n"
)
MEASURED = {"size": 500.0, "dims": 2, "vit": claims.untestable("no vision model here")}


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A claims file of the paper "big", in a data folder of its own."""
    path = tmp_path / "data" / "papers" / "big" / "claims.csv"
    path.parent.mkdir(parents=True)
    path.write_text(ORIGIN + HEADER + ROWS, encoding="utf-8")
    monkeypatch.setattr(places, "shipped", lambda name: tmp_path / name)
    return path


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (">= 1000", [1000, 1001], [999.999]),
        ("> 0", [1e-300], [0, -1]),
        ("<= 1.05", [1.05, -7], [1.0500001]),
        ("<-2.5e-1", [-0.26], [-0.25, 0]),
        ("== 1", [1.0], [1.0000001, 0]),
        (" in [2, 9] ", [2, 5, 9], [1.99, 9.01]),
        ("in[-1,+.5]", [-1, 0.5], [0.51]),
    ],
)
def test_a_criterion_holds_exactly_where_it_says(text: str, inside: list[float], outside: list[float]) -> None:
    criterion = parse_criterion(text)
    assert [criterion.holds(float(value)) for value in inside] == [True] * len(inside)
    assert [criterion.holds(float(value)) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize(
    "text",
    ["", "1000", "=> 3", "!= 3", ">= 1000 or so", "in [1]", "in (1, 2)", "in [3, 2]", ">= inf", "< nan", ">= 1e999",
     "__import__('os')", ">= 1; 2", "in [1, 2] in [1, 2]"],
)  # fmt: skip
def test_anything_else_is_no_criterion(text: str) -> None:
    with pytest.raises(ValueError, match="criterion"):
        parse_criterion(text)


@given(bound=st.floats(-1e12, 1e12), value=st.floats(-1e12, 1e12))
def test_a_comparison_is_pythons_own(bound: float, value: float) -> None:
    assert parse_criterion(f">= {bound!r}").holds(value) == (value >= bound)
    assert parse_criterion(f"< {bound!r}").holds(value) == (value < bound)


@pytest.mark.usefixtures("paper")
def test_each_claim_gets_its_verdict_and_why() -> None:
    got = claims.check("big", MEASURED, model=MODEL, conditions="3 prompts")
    assert got.table["verdict"].tolist() == ["partly", "reproduced", "not testable"]
    assert got.table["why"].tolist() == [
        "500 misses >= 1000 but meets >= 300", "2 meets in [1, 3]", "no vision model here",
    ]  # fmt: skip
    assert got.table["measured"].tolist()[:2] == [500.0, 2.0]
    assert math.isnan(got.table["measured"].iloc[2])
    assert got.counts == {"reproduced": 1, "partly": 1, "not reproduced": 0, "not testable": 1}
    assert (got.title, got.paper, got.conditions) == ("Big Entries", "arXiv:2402.17762", "3 prompts")
    assert got.notes == ("tag code: read in the repository",)
    assert got.model == {**MODEL.provenance, "device": "cpu"}
    worse = claims.check("big", {**MEASURED, "size": 299.0, "dims": 4}, model=MODEL)
    assert worse.table["verdict"].tolist()[:2] == ["not reproduced"] * 2
    assert worse.table["why"].tolist()[:2] == ["299 misses >= 1000 and >= 300", "4 misses in [1, 3]"]


@pytest.mark.usefixtures("paper")
def test_the_number_shown_never_contradicts_the_verdict() -> None:
    # 999.99999 is "1000" in four digits, which would read as meeting >= 1000.
    got = claims.check("big", {**MEASURED, "size": 999.99999}, model=MODEL)
    assert got.table["verdict"].iloc[0] == "partly"
    assert float(got.rows()[0]["shown"]) < 1000


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (13886.4, "13890"),
        (2622, "2622"),
        (1.05, "1.05"),
        (0.0000123456, "1.235e-05"),
        (3.2e24, "3.2e+24"),
        (-7.0, "-7"),
    ],
)
def test_numbers_are_shown_in_four_digits_and_plainly(number: float, shown: str) -> None:
    assert claims.check("big", {**MEASURED, "size": number}, model=MODEL).rows()[0]["shown"] == shown


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("number", [np.float32(1500), np.int64(1500), 1500, np.array(1500.0)])
def test_any_kind_of_single_number_can_be_given(number: object) -> None:
    assert claims.check("big", {**MEASURED, "size": number}, model=MODEL).table["verdict"].iloc[0] == "reproduced"


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"size": 1, "dims": 2}, "claim 'vit' was not measured"),
        ({**MEASURED, "sizes": 1}, "no claim 'sizes'.*Nearest: size"),
        ({**MEASURED, "size": float("nan")}, "claim 'size' was measured as nan"),
        ({**MEASURED, "size": float("-inf")}, "claim 'size' was measured as -inf"),
        ({**MEASURED, "size": "not testable: no"}, "claim 'size' was given the text.*untestable"),
        ({**MEASURED, "size": [1, 2]}, "claim 'size' needs one number; got list"),
        ({**MEASURED, "size": None}, "claim 'size' needs one number; got NoneType"),
    ],
)
def test_a_measurement_that_cannot_be_judged_is_an_error_that_names_the_claim(
    measured: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        claims.check("big", measured, model=MODEL)


def test_untestable_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        claims.untestable("  ")


@pytest.mark.usefixtures("paper")
def test_an_unknown_paper_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no paper 'bigg'.*Nearest: big"):
        claims.check("bigg", {}, model=MODEL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + ROWS, "# title"),
        (ORIGIN.replace("arXiv:2402.17762", "") + HEADER + ROWS, "# paper"),
        (ORIGIN + HEADER.replace("tag,", "") + ROWS, "the columns must be"),
        (ORIGIN + HEADER, "has no claims"),
        (ORIGIN, "cannot be read as a table"),
        (ORIGIN + HEADER + ROWS.replace('"Large, and few"', "Large, and few"), "claim 'size' has 10 cells, not 9"),
        (ORIGIN + HEADER + ROWS.replace("dims,", "size,", 1), "claim id 'size' is used twice"),
        (ORIGIN + HEADER + ROWS.replace(">= 300", "about 300"), "claim 'size': criterion 'about 300'"),
        (ORIGIN + HEADER + ROWS.replace("Sec. 5", ""), "claim 'vit' has an empty 'where'"),
        (ORIGIN + HEADER + ROWS.replace("recall,", ","), "claim 'vit' has an empty 'tag'"),
        (ORIGIN + HEADER + ROWS.replace("vit,", "v it,", 1), "claim id 'v it'"),
        (ORIGIN + HEADER + 'x,"open', "cannot be read as a table"),
    ],
)
def test_a_claims_file_with_a_mistake_in_it_is_refused(paper: Path, text: str, message: str) -> None:
    paper.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        claims.read("big")


@pytest.mark.usefixtures("paper")
def test_claims_survive_json() -> None:
    got = claims.check("big", MEASURED, model=MODEL, conditions="3 prompts")
    text = json.dumps(got.to_json(), allow_nan=False)
    back = claims.Claims.from_json(json.loads(text))
    assert back.table.equals(got.table)
    assert json.dumps(back.to_json()) == text
    assert repr(back) == repr(got)


@pytest.mark.usefixtures("paper")
def test_a_record_that_is_not_claims_is_refused() -> None:
    stored = claims.check("big", MEASURED, model=MODEL).to_json()
    with pytest.raises(ValueError, match="not a claims record"):
        claims.Claims.from_json({k: v for k, v in stored.items() if k != "rows"})
    stored["rows"][0]["verdict"] = "splendid"
    with pytest.raises(ValueError, match="'splendid' is not one of"):
        claims.Claims.from_json(stored)


def test_a_notebook_gets_text_html_and_json(paper: Path) -> None:
    paper.write_text(
        ORIGIN + HEADER + ROWS.replace("In fixed dimensions", "<script>alert(1)</script>"), encoding="utf-8"
    )
    got = claims.check("big", MEASURED, model=MODEL)
    bundle = got._repr_mimebundle_()
    assert bundle[claims.MIME] == got.to_json()
    assert "&lt;script&gt;" in bundle["text/html"]
    assert "<script" not in bundle["text/html"]
    plain = bundle["text/plain"]
    for row in got.rows():
        for part in (row["statement"], row["verdict"], row["why"], f"[{row['tag']}]", row["paper_value"], row["where"]):
            assert part in plain
    assert plain == repr(got)
