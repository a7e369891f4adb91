"""Does a number meet a criterion such as `>= 1000` or `in [2, 9]`? A grammar of six forms, and no more."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_COMPARISON = re.compile(rf"(<=|>=|==|<|>)\s*{_NUMBER}")
_RANGE = re.compile(rf"in\s*\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]")


class Criterion(NamedTuple):
    """A bound that a measured number meets or misses: an operator and its one or two numbers."""

    text: str
    operator: str
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a number meets the criterion; `==` is exact, and a range includes its ends."""
        if self.operator == "in":
            return self.low <= value <= self.high
        return {
            "<": value < self.low,
            "<=": value <= self.low,
            ">": value > self.low,
            ">=": value >= self.low,
            "==": value == self.low,
        }[self.operator]


def parse_criterion(text: str) -> Criterion:
    """Read a criterion such as `>= 1000`, `== 1` or `in [2, 9]`.

    Args:
        text: one of the operators <, <=, >, >=, == and a number; or `in [a, b]`.

    Returns:
        The criterion.

    Raises:
        ValueError: when it is something else, or one of its numbers is not finite, or the range is empty.
    """
    if found := _COMPARISON.fullmatch(text.strip()):
        criterion = Criterion(text.strip(), found[1], float(found[2]), float(found[2]))
    elif found := _RANGE.fullmatch(text.strip()):
        criterion = Criterion(text.strip(), "in", float(found[1]), float(found[2]))
    else:
        raise ValueError(f"criterion {text!r} is not understood; write <, <=, >, >= or == and a number, or in [a, b].")
    if not (math.isfinite(criterion.low) and math.isfinite(criterion.high)):
        raise ValueError(f"criterion {text!r} has a number too large for a float.")
    if criterion.low > criterion.high:
        raise ValueError(f"criterion {text!r} is an empty range: its first number must be the smaller one.")
    return criterion
