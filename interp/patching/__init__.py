"""What happens if I change it? Activation, path and attribution patching, ablation."""

from interp.patching import ablation, activation, attribution, causal_tracing, effects, knockout, path

__all__ = ["ablation", "activation", "attribution", "causal_tracing", "effects", "knockout", "path"]
