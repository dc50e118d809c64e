"""Who is read and stepped when: one thread that owns the model, over the rows of one cache.

A round: (1) cancelled answers leave and waiting jobs enter free rows, first come first served; (2) a decode step of all
rows that have an answer, and a block for its next token (room.py), is launched; (3) one piece of at most `chunk` tokens
of prompts is read; (4) the step before is read and its tokens go to their answers. So neither steps nor prompts wait
for more than one of the other. Pieces end at multiples of `chunk`, so that what a row holds depends on its tokens, on
`chunk` and on what was cached, not on who else is there.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engine import Engine
from ..errors import Failure
from .jobs import Busy, Event, Job, Late, Row
from .metrics import Metrics
from .pieces import Piece, Pieces
from .pooled import PooledCache
from .room import Room
from .warm_up import warm_up

Array = Any
Post = Callable[[list[tuple[Job, Event]]], None]


class Scheduler:
    """post: is given what happened in a round, on the scheduler's thread, and hands it to `Job.tell`. deadline: seconds
    after which a prompt that was not read fails, and an answer ends where it is."""

    def __init__(
        self, engine: Engine, cache: PooledCache, chunk: int, queue: int, post: Post, deadline: float = math.inf
    ):
        self.engine, self.cache, self.chunk, self.queue, self.post = engine, cache, chunk, queue, post
        self.deadline = deadline
        self.model, self.vocab = engine.model, engine.config.vocab_size
        self.tokenizer = engine.tokenizer if engine.has_tokenizer else None
        self.rows = [Row(slot) for slot in range(len(cache.lengths))]
        self.metrics = Metrics()
        self.room = Room(cache, self.rows, self.metrics)
        self.waiting: deque[Job] = deque()
        self.pieces = Pieces(self.room, chunk)
        self.reading = self.pieces.rows
        self.steps: deque[tuple[int, list[Row]]] = deque()  # launched and not read, oldest first, with their numbers
        self.news: list[tuple[Job, Event]] = []
        self.changed = threading.Condition()
        self.is_closing = False
        self.dead: str | None = None  # why nothing works any more
        self.decoder = self.model.ops.decoder(self.model, cache, None)
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.is_ready = threading.Event()

    # --- called from other threads

    def start(self) -> None:
        """Returns when nothing is left to allocate. Raises Failure where that cannot be had."""
        self.thread.start()
        self.is_ready.wait()
        if self.dead:
            raise Failure(self.dead)

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none. Raises Busy where the queue is full, ValueError for more answers than rows or blocks."""
        if any(job.rows > len(self.rows) for job in jobs):
            raise ValueError(f"more than {len(self.rows)} answers to a prompt")
        if not all(map(self.room.fits, jobs)):
            raise ValueError("so many answers to so long a prompt need more than the whole cache; ask for fewer")
        with self.changed:
            if self.dead or self.is_closing:
                raise Busy(self.dead or "the server is shutting down")
            free = sum(row.state == "free" for row in self.rows)
            if len(self.waiting) and len(self.waiting) + len(jobs) > self.queue + free:
                raise Busy(f"{len(self.waiting)} prompts wait already; try again later")
            self.waiting.extend(jobs)
            self.metrics.requests += len(jobs)
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        with self.changed:
            for job in jobs:
                job.is_cancelled = True
            self.changed.notify()

    def close(self, seconds: float = 10.0) -> None:
        """Ends the thread; answers that still run are cancelled."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(seconds)

    def slots(self) -> list[dict[str, Any]]:
        return self.room.slots()

    def held(self) -> list[list[int]]:
        return self.room.held()

    def gauges(self) -> dict[str, tuple[float, str]]:
        """For `Metrics.text`."""
        return {
            "slots": (len(self.rows), "rows of the cache"),
            "slots_used": (sum(row.job is not None for row in self.rows), "rows whose answer runs or is being read"),
            "waiting": (len(self.waiting), "prompts that wait for a row"),
            "held_tokens": (int(self.cache.lengths.sum()), "tokens in the cache"),
            "cache_bytes": (self.cache.nbytes, "bytes of the cache"),
            **self.cache.gauges(),
        }  # fmt: skip

    # --- the thread

    def _run(self) -> None:
        try:
            warm_up(self.model, self.cache, self.decoder, self.chunk)
            self.is_ready.set()
            while self._wait():
                self._round()
            self._fail([*self.waiting], Busy("the server is shutting down"))
            self._fail([row.job for row in self.rows if row.job], Busy("the server is shutting down"))
        except BaseException as error:  # nobody else would hear of it
            self.dead = f"the engine has failed ({type(error).__name__}: {error}); restart the server"
            jobs = [*self.waiting, *(row.job for row in self.rows if row.job)]
            self._fail(jobs, Failure(self.dead))
        self.is_ready.set()
        self._post()

    def _wait(self) -> bool:
        """Until there is something to do; False when it is closing."""
        with self.changed:
            while not (self.is_closing or self.waiting or self.steps or any(row.job for row in self.rows)):
                self.changed.wait()
            return not self.is_closing

    def _round(self) -> None:
        self._drop_cancelled()
        self._end_late()
        self._admit()
        try:
            is_launched = self._launch()
            if self._ahead() == 0:
                self._read_step()
            self._read_prompts()
            if len(self.steps) > self._ahead() or not is_launched:
                self._read_step()
        except (Failure, MemoryError) as error:
            self._broken(error)
        if not self.steps and not any(row.job for row in self.rows):
            self._drain()  # a prompt that was cancelled while it was read
        self._post()

    def _drain(self) -> None:
        if self.metrics.occupancy.since:
            self.decoder.drain()
            self.metrics.occupancy.read()

    def _post(self) -> None:
        if self.news:
            news, self.news = self.news, []
            self.post(news)

    def _tell(self, job: Job, event: Event) -> None:
        if not job.is_cancelled:
            self.news.append((job, event))

    # --- rows come and go

    def _drop_cancelled(self) -> None:
        with self.changed:
            gone = [job for job in self.waiting if job.is_cancelled]
            for job in gone:
                self.waiting.remove(job)
        self.metrics.cancelled += len(gone)
        for row in self.rows:
            if row.job and row.job.is_cancelled:
                self.metrics.cancelled += row.index == 0
                self._leave(row)

    def _end_late(self) -> None:
        oldest = time.monotonic() - self.deadline
        with self.changed:
            late = [job for job in self.waiting if job.created < oldest]
            for job in late:
                self.waiting.remove(job)
        late += [row.job for row in self.reading if row.job.created < oldest]
        for job in late:
            self._end_job(job, Late(f"the prompt was not read within {self.deadline:g} seconds; try again later"))
        for row in self.rows:
            if row.state == "step" and row.job.created < oldest:
                text = row.answer.end("length")
                self._say(row, Event(row.index, text, finish_reason=row.answer.result.finish_reason))

    def _leave(self, row: Row) -> None:
        if row in self.reading:
            self.reading.remove(row)
        with self.decoder.ordered():
            if row.slot in self.cache.swapped:
                row.held = []
                self.cache.reset(row.slot)
            self._publish(row)
        row.leave()

    def _publish(self, row: Row) -> None:
        self.cache.publish(row.slot, row.held[: int(self.cache.lengths[row.slot])])

    def _admit(self) -> None:
        """Waiting jobs, in their order, as long as there are rows and blocks for the next one."""
        while True:
            with self.changed:
                free = [row for row in self.rows if row.state == "free"]
                if not self.waiting or self.waiting[0].rows > len(free) or not self.room.admits(self.waiting[0]):
                    return
                job = self.waiting.popleft()
            chosen = self.room.rows_for(job, free, self.decoder)
            for index, row in enumerate(chosen):
                self.metrics.rounds += 1
                row.used = self.metrics.rounds
                row.begin(job, index)
            self.reading.append(chosen[0])

    # --- prompts

    def _read_prompts(self) -> None:
        with self.decoder.ordered():
            if pieces := self.pieces.next():
                self._pass(pieces)

    def _pass(self, pieces: list[Piece]) -> None:
        rows, inputs = [row for row, _ in pieces], [piece for _, piece in pieces]
        batch = self.cache.batch_for([row.slot for row in rows], map(len, inputs))
        if media := [medium for row in rows for medium in row.job.media]:
            batch = batch.reading([row.job.ids for row in rows], media)
        scored = rows[0].job.prompt_logprobs is not None
        number = self.metrics.occupancy.launch()
        try:
            if scored:
                logits = self.model.forward(np.array(inputs[0]), self.cache, batch, every=True)
                rows[0].job.score(batch.starts[0], logits, self.tokenizer)
                logits = self.model.ops.xp.asarray(logits[-1:])
                self.metrics.occupancy.read(number)
            else:
                logits = self.model.step(np.concatenate(inputs), self.cache, batch, lambda logits: logits)[1]
        except (Failure, MemoryError) as error:
            self.cache.rollback(batch)
            for row in rows:
                self._end_job(row.job, error)
            return
        self.metrics.read_tokens += sum(batch.counts)
        for row in rows:
            self._publish(row)
        whole = [i for i, row in enumerate(rows) if self.cache.lengths[row.slot] == len(row.job.ids)]
        if whole:  # else nobody waits for the pass
            self._read_steps()
        for i in whole:
            self.reading.remove(rows[i])
            self._begin(rows[i], logits[i])

    def _begin(self, first: Row, logits: Array) -> None:
        """A prompt is read: its answers begin. logits: float32 [vocab] on the back end."""
        job = first.job
        rows = sorted((row for row in self.rows if row.job is job), key=lambda row: row.index)
        for row in rows[1:]:
            self.cache.take_over(first.slot, row.slot, len(job.ids))
            row.held = list(job.ids)
        for row in rows:
            if job.reads_only:
                self._tell(job, Event(row.index, finish_reason="length"))
                self._leave(row)
                continue
            drawing = row.start(self.tokenizer, self.vocab)
            try:
                allowed = row.matcher.mask() if row.matcher else None
                token = self.decoder.join(row.slot, drawing, logits, allowed)
                self.metrics.occupancy.read()  # the steps before have ended, too
                self._take(row, token, None if job.options.logprobs is None else self.model.ops.numpy(logits))
            except Failure as error:
                self._end_job(job, error)
                break
        job.begun = time.monotonic()
        self.metrics.first_tokens.add(job.begun - job.created)

    # --- steps

    def _ahead(self) -> int:
        return 0 if any(row.is_synchronous for row in self.rows) else self.decoder.ahead

    def _going(self) -> list[Row]:
        """The rows that take one more step behind those in flight."""
        return [row for row in self.rows if row.state == "step" and self._should_continue(row)]

    def _should_continue(self, row: Row) -> bool:
        new = row.answer.result.new_tokens + row.in_flight
        return new < row.job.options.max_tokens and self.cache.lengths[row.slot] + row.in_flight < self.cache.context

    def _launch(self) -> bool:
        """Whether there was a step to launch."""
        count = len(self.steps)
        while len(self.steps) <= self._ahead() and (rows := self.room.for_step(self._going(), self.decoder)):
            if not all([self._allow(row) for row in rows]):
                continue
            number = self.metrics.occupancy.launch()
            self.decoder.launch([row.slot for row in rows])
            self.steps.append((number, rows))
            for row in rows:
                row.in_flight += 1
        return len(self.steps) > count

    def _allow(self, row: Row) -> bool:
        """Tells the decoder what a row's grammar allows next; where that cannot be said, the answer ends: False."""
        try:
            if row.matcher and (mask := row.matcher.mask()) is not None:
                self.decoder.allow(row.slot, mask)
        except Failure as error:
            self._end_job(row.job, error)
            return False
        return True

    def _read_step(self) -> None:
        if not self.steps:
            return
        tokens, _ = self.decoder.read()
        number, rows = self.steps.popleft()
        self.metrics.occupancy.read(number)
        self.metrics.step(len(rows))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.in_flight -= 1
            if row.state == "leave":  # this step was launched before its answer had ended
                row.held.append(token)
                row.state = "leave" if row.in_flight else "free"
                continue
            try:
                has_logprobs = row.job.options.logprobs is not None
                self._take(row, token, self.decoder.logits_of(row.slot) if has_logprobs else None)
            except Failure as error:
                self._end_job(row.job, error)

    def _read_steps(self) -> None:
        """All that were launched, each told at once: what follows waits for the pass that was launched behind them."""
        try:
            while self.steps:
                self._read_step()
                self._post()
        except (Failure, MemoryError) as error:
            self._broken(error)

    def _take(self, row: Row, token: int, logits: np.ndarray | None) -> None:
        """A new token of an answer. Raises GrammarError, as its matcher does."""
        answer, result = row.answer, row.answer.result
        row.held.append(token)
        before = result.new_tokens
        text = answer.add(token, logits, self.cache.lengths[row.slot] == self.cache.context)
        if row.matcher and result.finish_reason is None:
            row.matcher.take(token)
            if row.matcher.is_done:
                text += answer.end("stop")
        is_new = result.new_tokens > before
        self.metrics.new_tokens += is_new
        said = result.logprobs[-1] if is_new and result.logprobs else None
        self._say(row, Event(row.index, text, token if is_new else None, said, result.finish_reason))

    def _say(self, row: Row, event: Event) -> None:
        self._tell(row.job, event)
        if event.finish_reason:
            self.metrics.finished += 1
            self._leave(row)

    # --- what goes wrong

    def _end_job(self, job: Job, error: Exception) -> None:
        self._fail([job], error)
        for row in self.rows:
            if row.job is job:
                self._leave(row)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            if not job.is_cancelled:
                self.metrics.failed += 1
                self._tell(job, Event(0, error=error))
                job.is_cancelled = True

    def _broken(self, error: Exception) -> None:
        """A step failed: its answers end with an error, and the rows are empty."""
        self.decoder.drain()
        self.metrics.occupancy.read()
        self.steps.clear()
        for row in self.rows:
            row.in_flight = 0
            if row.state in ("step", "leave"):
                if row.job:
                    self._fail([row.job], error)
                row.leave()
                row.held = []
                self.cache.reset(row.slot)
