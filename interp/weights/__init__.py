"""What do the parameters say? What each head does, read from its weights without a prompt."""

from interp.weights import composition, describe, maps, salient, structure, svd

__all__ = ["composition", "describe", "maps", "salient", "structure", "svd"]
