"""How does information flow to the prediction? Which parts write it, and which earlier ones made those write it."""

from interp.flow import (
    anchor_compression,
    anchor_errors,
    anchor_reweighting,
    anchors,
    attribution,
    logit_flow,
    rollout,
    stages,
)  # fmt: skip

__all__ = [
    "anchor_compression", "anchor_errors", "anchor_reweighting", "anchors", "attribution", "logit_flow", "rollout",
    "stages",
]  # fmt: skip
