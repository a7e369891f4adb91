"""What every method shares: the Result, hooks that must fire, metrics, batching and the registry."""
