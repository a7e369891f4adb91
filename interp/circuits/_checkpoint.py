"""How does a search go on whose every step needs the one before? From the last state that was written down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from interp.circuits._ablated import Ablated, _digest
from interp.core.batching import _read, _store
from interp.core.places import cache_folder


class Checkpoint:
    """The state of one search, in one file of the cache folder.

    Args:
        identity: everything that decides the outcome, JSON types; None for a search that cannot be told from another
            (its metric is a function), which is not stored.
    """

    def __init__(self, identity: Mapping[str, Any] | None) -> None:
        key = json.dumps(None if identity is None else dict(identity), sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        self._file = None if identity is None else cache_folder() / "searches" / f"{name}.npz"

    def load(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
        """The state that an interrupted search left.

        Args:
            shapes: of each array of a state; -1 for a length that is any.

        Returns:
            The arrays; None if there are none, they cannot be read, or they are not such arrays (another version of
            this library may have left them), so that the search starts anew.
        """
        state = None if self._file is None else _read(self._file)
        if state is None or state.keys() != shapes.keys():
            return None
        fits = all(
            state[name].dtype.kind in "bif"
            and state[name].ndim == len(shape)
            and all(want in (-1, have) for want, have in zip(shape, state[name].shape, strict=True))
            for name, shape in shapes.items()
        )
        return state if fits else None

    def store(self, state: Mapping[str, np.ndarray]) -> None:
        """Put a state in the place of the one before, whole or not at all."""
        if self._file is not None:
            _store(self._file, state)

    def clear(self) -> None:
        """The search is done."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def digest_of(made: Ablated, edges: np.ndarray) -> dict[str, str]:
    """What the names of an ablation and of some edges do not say.

    Args:
        made: the task.
        edges: bool `[dst src]`.

    Returns:
        Fingerprints of the edges and of the values that cut ones carry.
    """
    means = [mean.double().cpu().numpy() for _, mean in sorted(made.source.means.items())]
    taken = [] if made.source.tokens is None else [made.source.tokens.cpu().numpy()]
    return {"edges_fingerprint": _digest(edges), "source_fingerprint": _digest(*taken, *means)}
