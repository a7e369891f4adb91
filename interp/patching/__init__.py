"""What happens if I change it? Activation, path and attribution patching, ablation."""

from interp.patching import ablation, activation, causal_tracing, effects, knockout, path

__all__ = ["ablation", "activation", "causal_tracing", "effects", "knockout", "path"]
