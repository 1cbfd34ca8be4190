"""The harness itself: results come back by rank, failures name the rank, and nothing survives a call."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks


def total(start: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(value)
    return dist.get_rank(), value


def fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank is unhappy")
    dist.barrier()


def sleep_with_child(path: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_results_come_back_by_rank():
    results = run_ranks(total, 2, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(value.item() == 21 for _, value in results)


def test_a_failing_rank_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*the last rank is unhappy"):
        run_ranks(fail_on_last, 2)


def test_a_timeout_kills_the_whole_tree(tmp_path):
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1"):
        run_ranks(sleep_with_child, 1, str(tmp_path / "pid"), timeout=8)
    deadline = time.monotonic() + 5
    while alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int((tmp_path / "pid").read_text()))
