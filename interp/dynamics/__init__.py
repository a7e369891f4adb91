"""How did it form? Small transformers trained here, the same way each time."""

from interp.dynamics import back_attention, composition, multiple_choice, repeats, train

__all__ = ["back_attention", "composition", "multiple_choice", "repeats", "train"]
