"""Hours of random requests to a loaded model: memory stays flat, and every answer is what a fresh process gives, bit
for bit.

    python -m tests.soak --json docs/results/soak.json      what `make soak` runs: the fuzz, an hour of two processes,
                                                            an hour of a server; with Ray, replicas (cluster.py)
    python -m tests.soak --only 1234 --seed S               the digest of one request, in a fresh process

A request is made from (seed, number) alone: single prompts, batches, several answers, chats with answers broken off,
prompt caches saved and loaded, logits, wrong requests, and passes in which memory runs out or Ctrl-C comes. Its digest
covers token ids, texts, finish reasons, log-probabilities and logits. Requests drawn at random are run again, each in a
process of its own. The server gets requests that end, that are broken off, and that are no requests at all, 2,000 or
more: memory stays flat, every slot is free afterwards, and every answer is the one that its prompt gets alone.
"""

from __future__ import annotations

import argparse
import collections
import gc
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from minioscar import Conversation, Engine, Failure, Options, Sampling, UserError, load
from minioscar.answers import Generation
from minioscar.evaluation.fidelity import default_text

from .fuzz import fuzz

ROOT = Path(__file__).parents[1]


class Request:
    """One request to an engine; `run` returns what came of it, as JSON would have it."""

    KINDS = ("single", "batch", "several", "chat", "cache", "logits", "wrong", "memory", "interrupt")

    def __init__(self, engine: Engine, seed: int, number: int):
        self.engine, self.rng = engine, random.Random(f"{seed}:{number}")
        self.kind = self.rng.choice(self.KINDS)

    def run(self) -> Any:
        return getattr(self, self.kind)()

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.run(), sort_keys=True).encode()).hexdigest()

    # --- what a request is made of

    def text(self, most: int = 1200) -> str:
        """A stretch of English, from a few characters to more than a block of the cache; not blank."""
        whole, size = default_text(), int(self.rng.triangular(5, most, 60))
        while True:
            at = self.rng.randrange(len(whole) - size)
            if piece := whole[at : at + size].strip():
                return piece

    def options(self, **more: Any) -> dict[str, Any]:
        rng = self.rng
        temperature = rng.choice([0.0, 0.0, 0.7, 1.2])
        penalties = rng.choice([1.0, 1.0, 1.2]), rng.choice([0.0, 0.5]), rng.choice([0.0, 0.0, 0.3])
        filters = rng.choice([0, 40]), rng.choice([1.0, 0.9]), rng.choice([0.0, 0.05])
        sampling = Sampling(temperature, *filters, rng.randrange(2**32), *penalties)
        return {
            "max_tokens": rng.choice([1, 4, 16, 40]),
            "sampling": sampling,
            "stop": rng.choice(
                [
                    (),
                    ("\n\n",),
                    ("the", "."),
                ]
            ),
        } | more

    @staticmethod
    def plain(result: Generation) -> dict[str, Any]:
        entries = [entry for first in result.logprobs or [] for entry in (first, *first.top)]
        probabilities = [[entry.token_id, entry.logprob] for entry in entries]
        return {"ids": result.token_ids, "text": result.text, "why": result.finish_reason, "logprobs": probabilities}

    # --- the kinds

    def single(self) -> Any:
        options = self.options(logprobs=self.rng.choice([None, 0, 3]))
        return self.plain(self.engine.generate(self.text(), chat=self.rng.random() < 0.5, **options))

    def batch(self) -> Any:
        prompts = [self.text(600) for _ in range(self.rng.randint(2, 4))]
        return [self.plain(result) for result in self.engine.generate(prompts, chat=False, **self.options())]

    def several(self) -> Any:
        run = self.engine.start([self.text()], chat=False, options=Options(**self.options(n=self.rng.randint(2, 3))))
        for _ in run:
            pass
        return [self.plain(result) for result in run.results]

    def chat(self) -> Any:
        conversation, rng = Conversation(self.engine, system=rng_or_none(self.rng, self.text), ctx=1024), self.rng
        for _ in range(rng.randint(1, 4)):
            answer, left = conversation.say(self.text(400), **self.options()), rng.choice([10**9, 10**9, 0, 3])
            for n, _ in enumerate(answer):
                if n == left:  # broken off
                    answer.close()
                    break
            if rng.random() < 0.2:
                conversation.reset()
        return [list(conversation.messages), conversation.held]

    def cache(self) -> Any:
        chat = self.rng.random() < 0.5
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "c.kv.safetensors"
            self.engine.prefill(self.text(3000), chat=chat).save(path)
            cache = self.engine.load_cache(path)
        questions = [self.text(60) for _ in range(self.rng.randint(1, 2))]
        return [self.plain(result) for result in self.engine.generate(questions, cache=cache, **self.options())]

    def logits(self) -> Any:
        ids = self.engine.encode(self.text(), chat=False)
        return hashlib.sha256(self.engine.logits(ids).tobytes()).hexdigest()

    def wrong(self) -> Any:
        calls: list[Callable[[], Any]] = [
            lambda: self.engine.generate(""),
            lambda: self.engine.generate([1, 10**9]),
            lambda: self.engine.generate(default_text()[:60_000]),
            lambda: self.engine.generate("x", ctx=10**6),
            lambda: self.engine.generate("x", max_tokens=0),
            lambda: self.engine.load_cache("nowhere.safetensors"),
            lambda: Conversation(self.engine, ctx=-1),
        ]
        try:
            self.rng.choice(calls)()
        except UserError as error:
            return str(error)
        raise AssertionError("a wrong request was answered")

    def memory(self) -> Any:
        return self._broken(MemoryError, Failure)

    def interrupt(self) -> Any:
        return self._broken(KeyboardInterrupt, KeyboardInterrupt)

    def _broken(self, raised: type[BaseException], expected: type[BaseException]) -> Any:
        """A conversation of two turns, the second of which breaks off in some layer of some pass; then it goes on."""
        conversation, ops = Conversation(self.engine, ctx=1024), self.engine.ops
        question, options = self.text(300), self.options(stop=())
        "".join(conversation.say(self.text(900), **options))
        left, attention = self.rng.randrange(4 * self.engine.config.num_layers), type(ops).attention

        def attend(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise raised("as if")
            return attention(ops, *args)

        ops.attention = attend  # type: ignore[method-assign]
        try:
            "".join(conversation.say(question, **options))
        except expected:
            pass
        finally:
            del ops.attention
        "".join(conversation.say(self.text(100), **options))
        return [list(conversation.messages), conversation.held]


def rng_or_none(rng: random.Random, text: Callable[[int], str]) -> str | None:
    return text(100) if rng.random() < 0.3 else None


def engine() -> Engine:
    return load("smollm2-135m", device="cpu")


def resident_mb(process: int | str = "self") -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def served(hours: float, least: int, seed: int, name: str | None) -> dict[str, Any]:
    """So many connections to a server, and more for so many hours. name: a model's (None: a tiny one is made); answers
    of it that differ under load are counted. Raises AssertionError for a wrong answer."""
    from .serving import server
    from .test_serve_smollm2 import connect
    from .tiny import write_talker

    begun, resident, answered, asked, different = time.monotonic(), [], 0, 0, []
    how = "--slots", "4", "--ctx", "1024", "--chunk", "128", "--queue", "1000", "--host-cache", "0.01"
    with tempfile.TemporaryDirectory() as folder:
        make = {"num_hidden_layers": 1, "max_position_embeddings": 8192}
        model = name or str(write_talker(Path(folder) / "tiny", seed, **make))
        with server(model, *how) as one:
            while asked < least or time.monotonic() < begun + hours * 3600:
                answered += connect(one, 25 if name else 200, seed + asked, different if name else None)
                asked += 25 if name else 200
                resident.append(resident_mb(one.process.pid))
                minutes = (time.monotonic() - begun) / 60
                print(f"{asked} connections, {resident[-1]:.0f} MB, {minutes:.0f} minutes", file=sys.stderr, flush=True)
            names = "cached_tokens_total", "blocks_restored", "new_tokens_total", "cancelled_total", "failed_total"
            counted = {which: int(one.metric(which)) for which in names}
            code = one.end()
    quarters = [round(float(np.median(part)), 1) for part in np.array_split(resident, 4)]
    found = {"model": name or "tiny", "seconds": round(time.monotonic() - begun), "connections": asked}
    found |= {"answered": answered, **({"near_ties": len(different)} if name else {})}
    return found | {"resident_mb_by_quarter": quarters, "exit_code": code, **counted}


def spread(seed: int) -> bool:
    """Replicas over a Ray cluster of this machine, where Ray is installed; the figures are cluster.py's own."""
    if find_spec("ray") is None:
        print("replicas over Ray are left out: pip install 'minioscar[ray]'", file=sys.stderr)
        return True
    command = [sys.executable, "-m", "tests.cluster", "--seed", str(seed), "--json", "docs/results/ray.json"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def soak(hours: float, seed: int, again: int) -> dict[str, Any]:
    """Requests for so many hours, then `again` of them in fresh processes."""
    one, start, end = engine(), time.monotonic(), time.monotonic() + hours * 3600
    digests, kinds, resident, at = [], collections.Counter(), [], 0
    while time.monotonic() < end:
        request = Request(one, seed, at)
        digests.append(request.digest())
        kinds[request.kind] += 1
        at += 1
        if at % 10 == 0:
            gc.collect()
            resident.append((time.monotonic() - start, resident_mb()))
        if at % 100 == 0:
            print(
                f"{at} requests, {resident[-1][1]:.0f} MB, {(end - time.monotonic()) / 60:.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )
    seconds, chosen = time.monotonic() - start, random.Random(seed).sample(range(at), min(again, at))
    same = sum(digests[number] == fresh(seed, number) for number in chosen)
    quarters = (
        [float(np.median([mb for _, mb in part])) for part in np.array_split(resident, 4)] if len(resident) >= 4 else []
    )
    late = np.array(resident[len(resident) // 2 :])
    slope = float(np.polyfit(late[:, 0] / 3600, late[:, 1], 1)[0]) if len(late) > 2 else 0.0
    return {
        "model": "smollm2-135m",
        "kv": one.scheme.name,
        "seed": seed,
        "seconds": round(seconds),
        "requests": at,
        "kinds": dict(sorted(kinds.items())),
        "resident_mb_by_quarter": [round(mb, 1) for mb in quarters],
        "growth_mb_per_hour": round(slope, 2),
        "fresh_processes": len(chosen),
        "equal_in_fresh_processes": same,
    }


def fresh(seed: int, number: int) -> str:
    command = [sys.executable, "-m", "tests.soak", "--only", str(number), "--seed", str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def side_by_side(args: argparse.Namespace) -> list[dict[str, Any]]:
    """`soak` in so many processes at a time, each with a seed of its own."""
    options = ["--hours", str(args.hours), "--again", str(args.again), "--cases", "0", "--connections", "0"]
    options += ["--processes", "1"]
    commands = [
        [sys.executable, "-m", "tests.soak", *options, "--seed", str(args.seed + i)] for i in range(args.processes)
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for command in commands]
    said = [process.communicate()[0] for process in running]
    return [run for text in said for run in json.loads(text)["soak"]]


def passed(run: dict[str, Any], hours: float) -> bool:
    flat = abs(run["growth_mb_per_hour"]) * hours < 0.02 * max(run["resident_mb_by_quarter"] or [1])
    return flat and run["equal_in_fresh_processes"] == run["fresh_processes"]


def is_flat(run: dict[str, Any]) -> bool:
    """The memory of a server: from the second quarter on, the first one warms up."""
    _, second, _, last = run["resident_mb_by_quarter"]
    return last - second < 0.02 * second


def main() -> int:
    parser = argparse.ArgumentParser(description="soak and fuzz")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2, help="of so many hours each, at the same time")
    parser.add_argument("--cases", type=int, default=20_000, help="of the fuzz; 0: none")
    parser.add_argument("--again", type=int, default=40, help="requests of each that fresh processes run again")
    parser.add_argument("--connections", type=int, default=2000, help="to a server, for as many hours; 0: none")
    parser.add_argument("--model", help="that the server has (a tiny one)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="N")
    parser.add_argument("--json", metavar="F")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # NumPy reads it when it is imported; one thread sums in one order
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.soak", *sys.argv[1:]], {**os.environ, "OMP_NUM_THREADS": "1"}
        )
    if args.only is not None:
        print(Request(engine(), args.seed, args.only).digest())
        return 0
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    report: dict[str, Any] = {"meta": machine | {"threads": 1, "date": time.strftime("%Y-%m-%d")}}
    if args.cases:
        report["fuzz"] = fuzz(args.cases, args.seed, progress=sys.stderr.isatty())
    report["soak"] = side_by_side(args) if args.processes > 1 else [soak(args.hours, args.seed, args.again)]
    if args.connections:
        report["serve"] = served(args.hours, args.connections, args.seed, args.model)
    is_well_spread = not args.connections or spread(args.seed)
    text = json.dumps(report, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)
    is_served = "serve" not in report or not report["serve"]["exit_code"] and is_flat(report["serve"])
    is_right = is_served and is_well_spread and not report.get("fuzz", {}).get("failures")
    return 0 if is_right and all(passed(run, args.hours) for run in report["soak"]) else 1


if __name__ == "__main__":
    sys.exit(main())
