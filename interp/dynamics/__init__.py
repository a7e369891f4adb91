"""How did it form? Small transformers trained here, the same way each time."""

from interp.dynamics import back_attention, composition, depth, multiple_choice, repeats, train, two_hop

__all__ = ["back_attention", "composition", "depth", "multiple_choice", "repeats", "train", "two_hop"]
