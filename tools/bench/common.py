"""What every benchmark shares: taking turns, the machine, and the file of results."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import torch

RESULTS = Path(__file__).parent / "results"


def in_turns(functions: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each function in each round. All run once in every round, so that what disturbs the machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            gc.collect()
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times ``fast`` is as fast as ``slow``: the median over the rounds, each taken by itself."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def write_result(name: str, result: Mapping[str, Any], packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Writes ``results/NAME.json`` with machine, versions, date and command around ``result``; returns all of it."""
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: _version(package) for package in packages},
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")
    return record


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu, "load_before": round(os.getloadavg()[0], 2)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
