"""How does information flow to the prediction? Which parts write it, and which earlier ones made those write it."""

from interp.flow import attribution, logit_flow, stages

__all__ = ["attribution", "logit_flow", "stages"]
