"""Layers of experts, of which a router chooses a few for each token (mixture of experts).

reference.py has their meaning in array code, plans.py what kernels/experts/ are launched with, on_card.py the layer by
these kernels. Back ends call them in one place each: `experts` of ops/reference.py and of ops/cuda.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """The MLPs of which each token takes a few in every layer, as a router of the layer says (mixture of experts)."""

    count: int
    per_token: int
    normalized: bool  # the weights of a token's experts are divided by their sum
