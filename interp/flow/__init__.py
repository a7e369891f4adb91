"""How does information flow to the prediction? Which parts write it, and which earlier ones made those write it."""

from interp.flow import attribution

__all__ = ["attribution"]
