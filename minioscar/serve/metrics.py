"""What the server counts, in the text that Prometheus reads (its exposition format, version 0.0.4)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PREFIX = "minioscar_"


class Histogram:
    """Seconds, counted by how many they are at most."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[sum(seconds > bound for bound in SECONDS)] += times
        self.total += seconds * times

    def lines(self, name: str, help: str) -> list[str]:
        name, seen = PREFIX + name, 0
        lines = [f"# HELP {name} {help}", f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {seen}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {seen}"]


class Occupancy:
    """Seconds in which the card had work, as the host sees it: from a launch where there was none until what was
    launched last has been read. The card does what it is told in order; waits between the launches of a pass count as
    work."""

    def __init__(self) -> None:
        self.seconds, self.since, self.launched = 0.0, 0.0, 0

    def launch(self) -> int:
        """Its number."""
        self.since = self.since or time.monotonic()
        self.launched += 1
        return self.launched

    def read(self, number: int | None = None) -> None:
        """This launch is done, and all before it. None: all are."""
        if self.since and number in (None, self.launched):
            self.seconds += time.monotonic() - self.since
            self.since = 0.0


@dataclass
class Metrics:
    """Counters of the scheduler; only its thread writes them, but for `requests`."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    read_tokens: int = 0
    hit_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    rounds: int = 0  # rows given to answers, which orders them by use
    first_tokens: Histogram = field(default_factory=Histogram)
    between: Histogram = field(default_factory=Histogram)
    occupancy: Occupancy = field(default_factory=Occupancy)
    last: float = 0.0

    def step(self, rows: int) -> None:
        """A decode step of so many rows was read."""
        now = time.monotonic()
        if now - self.last < SECONDS[-1]:
            self.between.add(now - self.last, rows)
        self.last = now
        self.steps += 1

    def text(self, gauges: dict[str, tuple[float, str]]) -> str:
        """gauges: name -> (value, help)."""
        counters = {
            "requests": (self.requests, "prompts that were taken"),
            "answers": (self.finished, "answers that ended by themselves"),
            "cancelled": (self.cancelled, "prompts whose client left"),
            "failed": (self.failed, "prompts that ended in an error"),
            "prompt_tokens": (self.read_tokens, "tokens of prompts that were read"),
            "cached_tokens": (self.hit_tokens, "tokens of prompts that were in the cache"),
            "new_tokens": (self.new_tokens, "tokens of answers"),
            "steps": (self.steps, "decode steps"),
            "swapped_out": (self.swapped_out, "times that an answer's blocks went to the host"),
            "swapped_in": (self.swapped_in, "times that they came back"),
            "busy_seconds": (round(self.occupancy.seconds, 6), "seconds in which the card had work"),
        }
        lines = []
        for name, (value, help) in counters.items():
            name = f"{PREFIX}{name}_total"
            lines += [f"# HELP {name} {help}", f"# TYPE {name} counter", f"{name} {value}"]
        for name, (value, help) in gauges.items():
            name = PREFIX + name
            lines += [f"# HELP {name} {help}", f"# TYPE {name} gauge", f"{name} {value:g}"]
        lines += self.first_tokens.lines("first_token_seconds", "from a request to its first token")
        lines += self.between.lines("step_seconds", "between two steps, once for each row of the later one")
        return "\n".join(lines) + "\n"
