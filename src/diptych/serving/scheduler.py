"""The engine's loop: jobs of any kind wait in one queue, and those that run go on together, one step a round.

A round admits what there is room for, takes one step of every picture (those alike as one batch), writes one token of
every text, and ends what is done or cancelled. A new job therefore waits for one round at most once there is room.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass

from diptych.core.errors import UserError
from diptych.inference.engine import Engine
from diptych.serving.drawing import Picture, advance
from diptych.serving.jobs import DrawingJob, Event, Job
from diptych.serving.metrics import Metrics
from diptych.serving.running import Running, Workspace, start
from diptych.serving.writing import Turns

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """No room for a further job; `wait` is when there should be some, in seconds."""

    def __init__(self, wait: int) -> None:
        super().__init__(f"the queue is full; try again in {wait} s")
        self.wait = wait


class Closing(Exception):
    """The server is being shut down and takes no further job."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """rows: images and texts that run at a time. memory: bytes that they may take at a time, None for any. queue: jobs
    that may wait. batching: whether requests share batches; otherwise they run one after the other."""

    rows: int = 32
    memory: int | None = None
    queue: int = 256
    batching: bool = True


class Scheduler:
    """Runs jobs in a thread of its own.

    Args:
        bounds: of admission. metrics: is told of rounds, batches and seconds.
    """

    def __init__(self, bounds: Bounds, metrics: Metrics) -> None:
        self.bounds = bounds
        self.metrics = metrics
        self.waiting: deque[Job] = deque()
        self.running: list[Running] = []
        self._spaces: dict[int, Workspace] = {}
        self._seconds = 1.0  # of a job, as lately seen
        self._change = threading.Condition()
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="diptych-engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: too many wait already. Closing: the server is being shut down. UserError: larger than any room.
        """
        if job.rows > self.bounds.rows:
            raise UserError(
                f"the request takes the room of {job.rows} usual images, and {self.bounds.rows} run at a time; ask for "
                "fewer or smaller ones"
            )
        if self.bounds.memory is not None and job.cost > self.bounds.memory:
            raise UserError(
                f"the request takes {job.cost / 1e6:,.0f} MB of memory, and requests may take "
                f"{self.bounds.memory / 1e6:,.0f} MB at a time here; ask for fewer or smaller images"
            )
        with self._change:
            if self._closing:
                raise Closing
            if len(self.waiting) >= self.bounds.queue:
                raise QueueFull(self.wait())
            self.waiting.append(job)
            self._change.notify()

    def wait(self) -> int:
        """Seconds until the queue should have room, when the first of the running jobs ends.

        A job is taken to last as long as late ones did; one that has run longer, as long again as it has run.
        """
        now = time.monotonic()
        run = [now - running.job.started for running in list(self.running) if running.job.started is not None]
        left = [self._seconds - taken if taken < self._seconds else taken for taken in run]
        return max(1, min(600, math.ceil(min(left, default=self._seconds))))

    def uses(self, engine: Engine) -> bool:
        """Whether any job of a model waits or runs."""
        with self._change:
            jobs = [*self.waiting, *(running.job for running in self.running)]
        return any(job.engine is engine for job in jobs)

    def forget(self, engine: Engine) -> None:
        """Drop what was kept of a model that is unloaded."""
        self._spaces.pop(id(engine), None)

    def refuse(self) -> None:
        """Take no further job, and end those that wait; those that run go on."""
        with self._change:
            self._closing = True
            waiting, self.waiting = list(self.waiting), deque()
        for job in waiting:
            job.tell(Event(kind="failed", value=Closing()))

    def close(self) -> None:
        """End the thread, and with it what runs."""
        self.refuse()
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join(timeout=60)

    # The loop

    def _loop(self) -> None:
        while True:
            with self._change:
                while not (self.waiting or self.running or self._stopped):
                    self._change.wait()
                if self._stopped:
                    break
            self._round()
        for running in self.running:
            self._end(running, Event(kind="failed", value=Closing()))

    def _round(self) -> None:
        self._drop_cancelled()
        self._admit()
        begun = time.monotonic()
        spaces = {id(running.space): running.space for running in self.running}.values()
        for space in spaces:
            mine = [running for running in self.running if running.space is space]
            self._draw(space, mine)
            self._write(space, mine)
        for running in list(self.running):
            result = self._guarded(running, running.result)
            if result is not None and running in self.running:
                self._end(running, Event(kind="done", value=result))
        for space in spaces:  # nothing of what is done is kept where no request follows
            if not any(running.space is space for running in self.running):
                space.joined.forget()
        self.metrics.rounds(time.monotonic() - begun, len(self.running), len(self.waiting))

    def _drop_cancelled(self) -> None:
        for running in [running for running in self.running if running.job.cancelled]:
            self._end(running, None)
        with self._change:
            gone = [job for job in self.waiting if job.cancelled]
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
        self.metrics.count("diptych_cancelled_total", len(gone))

    def _admit(self) -> None:
        """Start waiting jobs in their order while there is room."""
        while True:
            with self._change:
                used = sum(running.job.rows for running in self.running)
                room = self.bounds.rows - used if self.bounds.batching else int(not self.running) * self.bounds.rows
                if not self.waiting or self.waiting[0].rows > room:
                    return
                taken = sum(running.job.cost for running in self.running)
                if self.bounds.memory is not None and taken + self.waiting[0].cost > self.bounds.memory:
                    return
                job = self.waiting.popleft()
            job.started = time.monotonic()
            self.metrics.seconds("queue", job.started - job.submitted)
            job.tell(Event(kind="started"))
            space = self._spaces.setdefault(id(job.engine), Workspace(job.engine))
            try:
                running = start(job, space)
            except Exception as error:
                job.tell(Event(kind="failed", value=error))
                continue
            self.metrics.seconds("prepare", time.monotonic() - job.started)
            self.running.append(running)

    def _draw(self, space: Workspace, running: list[Running]) -> None:
        """One step of every picture of a model."""
        pictures = [picture for each in running for picture in each.pictures if not picture.done]
        if not pictures:
            return
        begun = time.monotonic()
        capacity = self.bounds.rows if self.bounds.batching else 1
        try:
            runs = advance(space.engine, pictures, space.joined, capacity)
        except Exception as error:
            self._fail_of(running, pictures, error)
            return
        self.metrics.batches(runs)
        self.metrics.seconds("draw", time.monotonic() - begun)

    def _write(self, space: Workspace, running: list[Running]) -> None:
        """One token of every text of a model."""
        begun = time.monotonic()
        owners = {id(row): each for each in running for row in each.rows}
        if space.texts.rows:
            count = len(space.texts.rows)
            try:
                done = space.texts.step()
            except Exception as error:
                writing = [each for each in running if each.rows]
                for each in writing:
                    self._end(each, Event(kind="failed", value=error))
                return
            self.metrics.count("diptych_text_tokens_total", count)
            for row in done:
                each = owners[id(row)]
                each.rows.remove(row)
                self._guarded(each, lambda each=each, row=row: each.text_done(row))
        for each in running:
            for turns in list(each.turns):
                self._turn(each, turns)
        if owners:
            self.metrics.seconds("write", time.monotonic() - begun)

    def _turn(self, running: Running, turns: Turns) -> None:
        turns.turn()
        if turns.done:
            running.turns.remove(turns)
            self._guarded(running, lambda: running.text_done(turns))

    def _fail_of(self, running: list[Running], pictures: list[Picture], error: Exception) -> None:
        """A step failed. Whose fault it is cannot be told from the batch: its requests fail with the error."""
        concerned = [each for each in running if any(picture in pictures for picture in each.pictures)]
        for each in concerned:
            self._end(each, Event(kind="failed", value=error))

    def _guarded(self, running: Running, call: object) -> object:
        assert callable(call)
        try:
            return call()
        except Exception as error:
            self._end(running, Event(kind="failed", value=error))
            return None

    def _end(self, running: Running, event: Event | None) -> None:
        """A job ends: with this event, or in silence where it was cancelled."""
        if running in self.running:
            self.running.remove(running)
        running.close()
        job = running.job
        if event is None:
            self.metrics.count("diptych_cancelled_total")
            return
        if event.kind == "done" and job.started is not None:
            taken = time.monotonic() - job.started
            self._seconds = 0.8 * self._seconds + 0.2 * taken
            if isinstance(job, DrawingJob):
                self.metrics.count("diptych_images_total", len(job.keys))
        job.tell(event)
