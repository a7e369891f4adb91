"""What can be read out midway? The logit lens, the tuned lens and lenses of attention heads."""

from interp.lenses import cached, logit, trajectory, tuned, tuned_library

__all__ = ["cached", "logit", "trajectory", "tuned", "tuned_library"]
