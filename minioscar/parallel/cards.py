"""The cards of this host that a model is split over, checked before anything long begins."""

from __future__ import annotations

from ..config import Config
from ..errors import UserError
from ..ops.reference import Reference
from ..oscar import Scheme
from .backend import Split, SplitReference
from .loading import load as load_weights
from .shares import check

__all__ = ["load_weights", "over"]


def over(count: int, ops: Reference, config: Config, scheme: Scheme) -> Split:
    """The back end of so many cards like the one that `ops` has; on the CPU they are simulated. Raises UserError where
    the model, the scheme or this machine has none for them."""
    check(config, scheme, count)
    if ops.name == "cpu":
        return SplitReference([ops, *(Reference() for _ in range(count - 1))], config)
    raise UserError("not yet")
