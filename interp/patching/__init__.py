"""What happens if I change it? Activation, path and attribution patching, ablation."""
