"""The cards of this host that a model is split over, checked before anything long begins."""

from __future__ import annotations

import os
import sys

from ..config import Config
from ..errors import UserError
from ..ops.reference import Reference
from ..oscar import Scheme
from .backend import Split, SplitReference
from .loading import load as load_weights
from .shares import check, local

__all__ = ["load_weights", "over"]


def over(count: int, ops: Reference, config: Config, scheme: Scheme) -> Reference:
    """The back end of so many cards like the one that `ops` has, itself for one; on the CPU they are simulated. Raises
    UserError where the model, the scheme or this machine has none for them."""
    if count == 1:
        return ops
    check(config, scheme, count)
    if ops.name == "cuda":
        return _of_gpus(count, ops, config, scheme)
    if ops.name != "cpu":
        raise UserError(f"--gpus {count}: {ops.name} has one card; leave it out")
    return SplitReference([ops, *(Reference() for _ in range(count - 1))], config)


def _of_gpus(count: int, ops: Reference, config: Config, scheme: Scheme) -> Split:
    from cupy.cuda import Device, runtime

    from ..ops.cuda import Cuda
    from ..ops.decode import unsupported
    from .collectives import MAX_CARDS, NOTHING_PUSHED, PUSHED
    from .cuda import SplitCuda

    there, option = runtime.getDeviceCount(), f"--gpus {count}"
    if count > there:
        raise UserError(f"{option}: this machine has {there}; give at most so many")
    if count > MAX_CARDS:
        raise UserError(f"{option} is more than {MAX_CARDS}; give fewer")
    _check_waiting(option)
    if reason := unsupported(local(config, count, 0), scheme, 1):
        raise UserError(f"{option}: {reason}, and array code runs on one card; leave it out")
    names = [runtime.getDeviceProperties(device)["name"].decode() for device in range(count)]
    if len(set(names)) > 1:
        raise UserError(f"{option}: the GPUs are {', '.join(names)}; choose equal ones by CUDA_VISIBLE_DEVICES")
    ranks = [ops]
    for device in range(1, count):
        with Device(device):
            ranks.append(Cuda())
    apart = _apart(count)
    cards = SplitCuda(ranks, config, NOTHING_PUSHED if apart else PUSHED)
    if apart:
        print(f"[{apart}: sums go through NCCL and the host, slower]", file=sys.stderr, flush=True)
        cards.links.sum(cards.xp.zeros(1, ops.dtype))  # NCCL connects cards before weights are read or steps captured
    cards.each(lambda _: Device().synchronize())  # counters are 0 before another card writes beside them
    return cards


def _check_waiting(option: str) -> None:
    """Raises UserError where cards could not wait for each other, or not sum a prompt."""
    from cupy.cuda import nccl, runtime

    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        raise UserError(f"{option}: CUDA_LAUNCH_BLOCKING lets no card wait for another's launch; unset it")
    if not nccl.available:
        way_out = f"pip install 'minioscar[gpus{runtime.runtimeGetVersion() // 1000}]'"
        raise UserError(f"{option}: NCCL, which sums prompts over GPUs, is not found; {way_out} brings it")


def _apart(count: int) -> str | None:
    """Why kernels of a card do not write into another's memory; None: they may from now on."""
    from cupy.cuda import Device, runtime

    if (os.environ.get("NCCL_P2P_DISABLE") or "0") != "0":  # also for cards that only say that they reach each other
        return "NCCL_P2P_DISABLE is set"
    pairs = [(device, other) for device in range(count) for other in range(count) if device != other]
    for device, other in pairs:
        if not runtime.deviceCanAccessPeer(device, other):
            return f"GPUs {device} and {other} do not reach each other's memory"
    for device, other in pairs:
        with Device(device):
            _reach(other)
    return None


def _reach(other: int) -> None:
    """Lets kernels of the current card write into another's memory."""
    from cupy.cuda import runtime

    try:
        runtime.deviceEnablePeerAccess(other)
    except runtime.CUDARuntimeError as error:
        if "PeerAccessAlreadyEnabled" not in str(error):
            raise
