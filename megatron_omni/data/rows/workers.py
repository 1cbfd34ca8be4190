"""Work done in order by forked processes that may die: what a lost one had begun is done again, and the order stays.

Task ``n`` goes to worker ``n % workers`` and its result comes as number ``n``, whoever computed it, so the number of
workers never shows in what comes out. A worker that was killed is replaced at once, one that was stopped within two
seconds, one that does not answer within ``PATIENCE`` then; each time the log names it, and the new one gets the same
tasks. A task that takes three workers down ends the run by name.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

import torch

from megatron_omni.runtime.errors import OmniError, WorkError
from megatron_omni.runtime.logs import get_logger

logger = get_logger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[int, Task], Result]
"""Number of the task and the task; called in a worker. The result is pickled."""

PATIENCE = 300.0
"""Seconds that one task may take; reading from remote storage is bounded below that."""
SLOW = 5.0
"""Seconds of waiting for a task after which the log says for what."""
_TICK = 0.5
_ATTEMPTS = 3


def ordered(work: Work[Task, Result], tasks: Iterator[Task], workers: int, ahead: int, describe: Callable[[Task], str]) -> Iterator[Result]:
    """``work(n, task)`` of each task, in order. Without workers it is called here, when its turn comes.

    Task ``n`` is begun when result ``n - ahead`` is asked for, not earlier: memory that earlier results lie in may be used
    again for it.

    Args:
        ahead: tasks given out beyond the one whose result is asked for.
        describe: what a task is about, for messages.

    Raises:
        OmniError: as ``work`` raised it.
        WorkError: ``work`` failed otherwise, or took down one worker after another.
    """
    if workers == 0:
        yield from (work(number, task) for number, task in enumerate(tasks))
        return
    pool: list[_Worker[Task, Result]] = []
    for place in range(workers):
        pool.append(_Worker(place, work, describe, pool))

    def close() -> None:
        while pool:
            pool.pop().close()

    atexit.register(close)  # multiprocessing would wait for them at exit
    try:
        given = taken = 0
        while True:
            # At first one task per worker and no more, so that the first result is not held up by planning the others.
            for task in islice(tasks, taken + min(workers + taken, 1 + ahead) - given):
                pool[given % workers].give(given, task)
                given += 1
            if taken == given:
                return
            yield pool[taken % workers].take()
            taken += 1
    finally:
        close()
        atexit.unregister(close)


class _Worker(Generic[Task, Result]):
    """One place in the pool, and the process that fills it at present."""

    def __init__(self, place: int, work: Work[Task, Result], describe: Callable[[Task], str], pool: list[_Worker[Task, Result]]) -> None:
        self.place, self.work, self.describe, self.pool = place, work, describe, pool
        self.pending: deque[tuple[int, Task]] = deque()
        self.attempts = 1
        """At the oldest pending task."""
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # the data set's memory maps are shared, and it starts at once
        self.pipe, far = context.Pipe()
        inherited = [worker.pipe for worker in (*self.pool, self)]
        self.process = context.Process(target=_serve, args=(far, self.work, inherited, os.getpid()), daemon=True)
        self.process.start()
        far.close()

    def give(self, number: int, task: Task) -> None:
        self.pending.append((number, task))
        self._send(number, task)

    def take(self) -> Result:
        """The result of the oldest pending task."""
        began, stopped, told = time.monotonic(), 0, False
        while True:
            if self.pipe in wait([self.pipe, self.process.sentinel], _TICK) or self.pipe.poll():
                try:
                    failure, value = pickle.loads(self.pipe.recv_bytes())
                except (EOFError, OSError):
                    failure, value = None, None
                else:
                    if failure is not None:
                        raise failure
                    self.pending.popleft()
                    self.attempts = 1
                    result: Result = value
                    return result
            waited = time.monotonic() - began
            stopped = stopped + 1 if _is_stopped(self.process.pid) else 0
            if not self.process.is_alive():
                self._replace(_end_of(self.process.exitcode))
            elif stopped > 1:
                self._replace("is stopped (SIGSTOP)")
            elif waited > PATIENCE:
                self._replace(f"has not answered for {waited:.0f} s")
            elif waited > SLOW and not told:
                told = True
                logger.warning("%s has been at it for %.0f s: %s", self._name, waited, self.describe(self.pending[0][1]))
                continue
            else:
                continue
            began, stopped, told = time.monotonic(), 0, False

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()

    @property
    def _name(self) -> str:
        return f"data worker {self.place} (process {self.process.pid})"

    def _send(self, number: int, task: Task) -> None:
        with contextlib.suppress(OSError):  # it is dead; whoever waits for the result sees to that
            self.pipe.send((number, task))

    def _replace(self, why: str) -> None:
        about = self.describe(self.pending[0][1])
        if self.attempts == _ATTEMPTS:
            raise WorkError(f"{self._name} {why}, as did {_ATTEMPTS - 1} before it over the same rows: {about}")
        self.attempts += 1
        logger.warning("%s %s while it packed %s; another one takes its place", self._name, why, about)
        self.close()
        self._start()
        for number, task in self.pending:
            self._send(number, task)


def _is_stopped(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _end_of(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed ({signal.Signals(-exitcode).name})"
    return f"ended with exit code {exitcode}"


# --------------------------------------------------------------------------- in the worker


def _serve(pipe: Connection, work: Work[Task, Result], inherited: list[Connection], parent: int) -> None:
    """Works until the rank closes the pipe or dies."""
    for other in inherited:
        other.close()  # or a sibling would keep the pipe open that tells of the rank's death
    # A signal to the process group is the rank's to handle: it finishes its step, and for that it needs its workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            while not pipe.poll(1.0):
                if os.getppid() != parent:
                    return
            number, task = pipe.recv()
            pipe.send_bytes(pickle.dumps(_attempt(work, number, task)))
        except (EOFError, OSError):
            return


def _attempt(work: Work[Task, Result], number: int, task: Task) -> tuple[Exception | None, Result | None]:
    try:
        return None, work(number, task)
    except OmniError as error:
        return error, None
    except Exception:
        return WorkError(f"a data worker failed:\n{traceback.format_exc()}"), None
