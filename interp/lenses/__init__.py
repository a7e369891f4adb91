"""What can be read out midway? The logit lens, the tuned lens and lenses of attention heads."""
