"""What every test may ask for: a seed that is printed, and a skip with the reason where there is no GPU."""

from __future__ import annotations

import gc
import os
import random
import signal

import pytest

import minioscar.evaluation.baselines  # noqa: F401  registers its schemes
from minioscar.ops import cuda_missing
from minioscar.oscar import SCHEMES

from .tiny import WINDOWS


def pytest_configure(config: pytest.Config) -> None:
    """What a shell runs in the background ignores Ctrl-C, and so would the programs that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests live until the end: no garbage collection need look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    """Random data starts here; printed, so that a failure can be run again with MINIOSCAR_TEST_SEED."""
    value = int(os.environ.get("MINIOSCAR_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"MINIOSCAR_TEST_SEED={value}")
    return value


@pytest.fixture
def windows(monkeypatch) -> None:
    """Schemes with other windows, as names for `--kv`."""
    for name, scheme in WINDOWS.items():
        monkeypatch.setitem(SCHEMES, name, scheme)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """What `-n auto` is: a process a core, but only one where there is a card, which they would have to share."""
    return None if cuda_missing() else 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # alone at the end, one would idle a core
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = cuda_missing() if gpu else None
    if reason:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=reason))
