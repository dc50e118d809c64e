"""How long a test waits, and how what must be quick is measured, on a machine that does many other things too.

What must come is waited for until it comes: the limit ends what hangs, and nothing else takes so long. What must be
quick is counted in seconds of the processor, which others do not use up.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 600.0  # seconds


@contextmanager
def at_most(seconds: float, what: str = "") -> Iterator[None]:
    """Raises AssertionError where the block takes more of the processor, in this process and those that end in it."""
    before = used()
    yield
    took = used() - before
    assert took < seconds, f"{what}: {took:.2f} s of the processor, more than {seconds}"


def used() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime
