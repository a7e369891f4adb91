"""Load any transformer, offline or from a hub; small ones with planted mechanisms."""

from interp.models import planted, toy
from interp.models.check import ModelCheckError, self_check
from interp.models.hooks import HookNotFiredError, Run, nearest, run
from interp.models.load import load
from interp.models.model import Model, Tokens
from interp.models.packaged import IntegrityError, catalogue, fetch, is_fetched, verify
from interp.models.sources import UnknownModelError, UnsafeFileError

__all__ = [
    "HookNotFiredError", "IntegrityError", "Model", "ModelCheckError", "Run", "Tokens", "UnknownModelError",
    "UnsafeFileError", "catalogue", "fetch", "is_fetched", "load", "nearest", "planted", "run", "self_check", "toy",
    "verify",
]  # fmt: skip
