"""Where are the project's data and notebooks, and where does the cache go?"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """A folder that ships with the project: "data" or "notebooks".

    Args:
        name: folder name at the top level of the project.

    Returns:
        Its path in a checkout, or inside the installed package.

    Raises:
        FileNotFoundError: when neither place has it.
    """
    for candidate in (_PACKAGE.parent / name, _PACKAGE / f"_{name}"):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"the project's {name!r} folder was not found beside or inside {_PACKAGE}: reinstall interp."
    )


def cache_folder() -> Path:
    """Folder for fetched models and unfinished sweeps: `$INTERP_CACHE`, else the user's cache folder.

    Returns:
        The path; not created.
    """
    return Path(os.environ.get("INTERP_CACHE") or platformdirs.user_cache_path("interp"))
