"""Work ahead of its consumer, in order: in processes for decoding, in a thread for encoding."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from megatron_omni.runtime.errors import WorkError

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_processes(
    function: Callable[[Given], Made], items: Iterable[Given], workers: int, ahead: int, start: Callable[..., None], *arguments: Any
) -> Iterator[Made]:
    """``map`` in ``workers`` processes, in order, never more than ``ahead`` items per process ahead of the caller.

    Args:
        start: Called with ``arguments`` in each process before its first item; ``workers`` 0: in this one.

    Raises:
        WorkError: A process died.
    """
    if workers == 0:
        start(*arguments)
        yield from map(function, items)
        return
    waiting: deque[Future[Made]] = deque()
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(start, *arguments)) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > ahead * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    except BrokenProcessPool as error:
        raise WorkError(
            "a worker process died, perhaps for want of memory; start again, with fewer --workers: finished shards are kept"
        ) from error


def in_thread(items: Iterable[Made], ahead: int) -> Iterator[Made]:
    """``items``, of which up to ``ahead`` are made in another thread while the caller works on the one before."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                return made.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:  # to be raised where the items are used
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := made.get())[0]:
            yield item[1]
        if item[1] is not None:
            raise item[1]
    finally:
        stopped.set()
        thread.join()


def _start(start: Callable[..., None], *arguments: Any) -> None:
    """One thread for arithmetic, and no life after the main process: it may be killed without a word."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    start(*arguments)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
