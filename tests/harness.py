"""Runs a function on several gloo ranks, each a process of its own, and leaves none behind."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

PR_SET_PDEATHSIG = 1


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Calls ``function(*args)`` on ``world_size`` ranks and returns what each returned, by rank.

    ``function`` stands at the top of a module (it is imported again in each process); the default process group
    (gloo) is up when it starts, so ``torch.distributed.get_rank()`` says who it is. Arguments and results are
    pickled. The first rank that fails raises ``RuntimeError`` with its traceback; after ``timeout`` seconds a
    ``TimeoutError`` names the ranks that had not returned, whose stacks are on standard error. Either way all
    ranks, and whatever they started, are killed.
    """
    # The store lives here, on a port that the system chose, so that no two tests can want the same one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            # In the parent's environment while the child starts: torch reads some of these when it is imported.
            with mock.patch.dict(os.environ, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}):
                process = context.Process(target=_rank_main, args=(writer, timeout, os.getpid(), function, args))
                process.start()
            writer.close()
            processes.append(process)
            pipes.append(reader)
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # in case it had no group of its own yet
            process.join()


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(pipes)} had not returned after {timeout} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died without a traceback (killed, or crashed in native code)") from None
            if failure:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(writer: Connection, timeout: float, parent: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # a group of its own, so that its data workers can be killed with it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    faulthandler.dump_traceback_later(max(1.0, 0.9 * timeout), exit=False)
    try:
        dist.init_process_group("gloo")
        message = pickle.dumps((None, function(*args)))
    except BaseException:
        message = pickle.dumps((traceback.format_exc(), None))
    writer.send_bytes(message)
    faulthandler.cancel_dump_traceback_later()
    # Peers may still be using this rank's sockets: the parent kills everyone once the last has answered.
    time.sleep(timeout)
