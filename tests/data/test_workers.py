"""Data workers: order kept whatever happens to them, every loss named in time, no orphans."""

from __future__ import annotations

import itertools
import logging
import mmap
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_omni.data.rows import workers
from megatron_omni.data.rows.workers import ordered
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.logs import get_logger


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the log says of workers."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = get_logger(workers.__name__)
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def run(work: Callable[[int, int], object], count: int = 3, tasks: int = 40, ahead: int = 6) -> Iterator[object]:
    return ordered(work, iter(range(tasks)), count, ahead, lambda task: f"row {task}")


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_order(count: int) -> None:
    def work(number: int, task: int) -> tuple[int, int]:
        time.sleep(random.random() / 200)
        return number, task * task

    assert list(run(work, count)) == [(number, number**2) for number in range(40)]
    assert list(run(work, count, tasks=0)) == []
    assert not children()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_is_named_and_replaced_in_the_same_order(fault: signal.Signals, messages: list[str]) -> None:
    def work(number: int, task: int) -> int:
        time.sleep(0.01)
        return task

    results = run(work)
    got = list(itertools.islice(results, 5))
    victim = children()[1]
    os.kill(victim, fault)
    began = time.monotonic()
    got += list(results)
    assert got == list(range(40))
    assert time.monotonic() - began < 5
    (message,) = messages
    assert message.startswith("data worker ") and f"(process {victim})" in message
    assert fault.name in message and "while it packed row" in message
    assert not children()


def test_random_losses_change_nothing(messages: list[str]) -> None:
    def work(number: int, task: int) -> int:
        time.sleep(0.003)
        return task

    dice = random.Random(0)
    got = []
    for result in run(work, count=3, tasks=120):
        got.append(result)
        if dice.random() < 0.15:
            os.kill(dice.choice(children()), signal.SIGKILL)
    assert got == list(range(120))
    assert len(messages) >= 5


def test_a_task_that_takes_down_every_worker_ends_the_run_by_name() -> None:
    def work(number: int, task: int) -> int:
        if task == 7:
            os._exit(3)
        return task

    results = run(work)
    assert list(itertools.islice(results, 7)) == list(range(7))
    with pytest.raises(WorkError, match=r"data worker 1 \(process \d+\) ended with exit code 3, as did 2 before it .* row 7"):
        next(results)
    assert not children()


def test_a_task_that_never_ends_is_named_then_given_up(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    monkeypatch.setattr(workers, "SLOW", 0.3)
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    flag = mmap.mmap(-1, 1)

    def work(number: int, task: int) -> int:
        if task == 3 and flag[0] == 0:
            flag[0] = 1  # the second attempt goes through
            while True:
                pass
        return task

    assert list(run(work, tasks=8)) == list(range(8))
    assert any("has been at it for" in message and "row 3" in message for message in messages)
    assert any("has not answered for" in message and "row 3" in message for message in messages)


@pytest.mark.parametrize(("error", "expected"), [(InputError("row 2 is odd"), InputError), (KeyError("row 2 is odd"), WorkError)])
def test_errors_arrive_as_they_were_raised(error: Exception, expected: type[Exception]) -> None:
    def work(number: int, task: int) -> int:
        if task == 2:
            raise error
        return task

    results = run(work)
    assert list(itertools.islice(results, 2)) == [0, 1]
    with pytest.raises(expected, match="row 2 is odd"):
        next(results)
    assert not children()


def test_no_task_is_begun_before_there_is_room_for_its_result() -> None:
    """Results live in shared slots: those that were taken last stay, whatever the workers have begun since."""
    ahead, keep = 4, 3
    slots = mmap.mmap(-1, 8 * (ahead + keep))

    def work(number: int, task: int) -> None:
        place = number % (ahead + keep) * 8
        slots[place : place + 8] = number.to_bytes(8, "little")

    for number, _ in enumerate(run(work, count=2, tasks=60, ahead=ahead)):  # type: ignore[arg-type]
        time.sleep(0.002)  # the workers run ahead as far as they may
        for kept in range(max(0, number - keep + 1), number + 1):
            place = kept % (ahead + keep) * 8
            assert int.from_bytes(slots[place : place + 8], "little") == kept


def _rank(pids: Path) -> None:
    results = run(lambda number, task: (time.sleep(0.01), task)[1], tasks=10**9)
    for _ in range(5):
        next(results)
    pids.with_suffix(".part").write_text(" ".join(map(str, children())))
    pids.with_suffix(".part").rename(pids)
    time.sleep(60)


def test_workers_end_with_their_rank(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(pids,))
    rank.start()
    deadline = time.monotonic() + 30
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    rank.kill()
    rank.join()
    orphans = [int(pid) for pid in pids.read_text().split()]
    assert len(orphans) == 3
    while any(Path(f"/proc/{pid}").exists() for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)
