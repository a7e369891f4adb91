"""Shape and type checks at run time, in tests only: must be imported before any part of `interp`."""

from jaxtyping import install_import_hook

install_import_hook("interp", "beartype.beartype")
