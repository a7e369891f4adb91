"""How did it form? Small transformers trained here, the same way each time."""

from interp.dynamics import multiple_choice, repeats, train

__all__ = ["multiple_choice", "repeats", "train"]
