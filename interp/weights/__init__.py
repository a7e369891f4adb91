"""What do the parameters say? What each head does, read from its weights without a prompt."""

from interp.weights import causal, composition, describe, dynamic, maps, salient, structure, svd

__all__ = ["causal", "composition", "describe", "dynamic", "maps", "salient", "structure", "svd"]
