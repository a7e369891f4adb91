"""How does information flow to the prediction? Which parts write it, and which earlier ones made those write it."""

from interp.flow import anchors, attribution, logit_flow, rollout, stages

__all__ = ["anchors", "attribution", "logit_flow", "rollout", "stages"]
