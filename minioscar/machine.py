"""What this machine has for a program: memory, and a card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Compute capability -> KiB of shared memory that a block may use.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


def host_bytes() -> int:
    """Memory of this machine that a program may still take without swapping, in bytes; a container's limit counts."""
    return min(_machine(), _cgroup())


def _machine() -> int:
    try:  # what Linux could free counts: its file cache fills all memory sooner or later
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS counts only what it has in all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


CGROUPS = (  # limit, use, and the file cache within the use: version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group that a container runs in leaves; no limit where there is none.

    docs.kernel.org, cgroup-v2, memory.
    """
    for limit, use, cached in CGROUPS:
        try:
            most, used = int((root / limit).read_text()), int((root / use).read_text())
            stat = dict(line.split() for line in (root / use).with_name("memory.stat").read_text().splitlines())
            return max(most - used + int(stat.get(cached, 0)), 0)
        except (OSError, ValueError):  # "max": no limit
            continue
    return 2**63


@dataclass(frozen=True)
class Card:
    """What plans are made for."""

    multiprocessors: int
    capability: int  # 90: compute capability 9.0

    @property
    def max_shared_bytes(self) -> int:
        """Dynamic shared memory that a block may use; one KiB is left for what a kernel declares statically."""
        return SHARED_KIB.get(self.capability, 99) * 1024 - 1024

    @classmethod
    @cache
    def current(cls) -> Card:
        """CuPy's current device."""
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        return cls(properties["multiProcessorCount"], 10 * properties["major"] + properties["minor"])
