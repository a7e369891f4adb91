"""What can be added to a model that stays as it is? Small trained modules, by hooks."""

from interp.interventions import back_attention

__all__ = ["back_attention"]
