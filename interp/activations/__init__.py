"""Which activations are odd? Massive activations, what they do, and biases that make them needless."""

from interp.activations import implicit_bias, massive, massive_intervention, massive_mechanism

__all__ = ["implicit_bias", "massive", "massive_intervention", "massive_mechanism"]
