"""The layout of a run directory, which describes itself: what was run, on what, and what came of it.

::

    RUN/config.yaml        the resolved recipe
    RUN/environment.json   machine, versions, command, commit
    RUN/metrics.jsonl      one StepReport per logged step
    RUN/checkpoints/       complete checkpoints, and `latest`
    RUN/eval/              scores by checkpoint
    RUN/logs/              messages by rank
    RUN/wandb/             wandb's own files, if it is on
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch

from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_write
from megatron_omni.schema import StepReport

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "numpy", "safetensors", "flash-attn", "triton", "apex")


@dataclass(frozen=True)
class RunDirectory:
    """Names inside a run directory; nothing is created before ``describe``."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.root / "eval"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def describe(self, recipe_yaml: str, world_size: int) -> None:
        """Writes ``config.yaml`` and ``environment.json``; for rank 0, before the first step."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        atomic_write(self.config, recipe_yaml)
        atomic_write(self.environment, orjson.dumps(_environment(world_size), option=orjson.OPT_INDENT_2))

    def reports(self) -> Iterator[StepReport]:
        """The logged steps in order; a last line that a kill cut short is left out."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                yield StepReport.from_json(orjson.loads(line))
            except (orjson.JSONDecodeError, TypeError) as error:
                if number == len(lines):
                    return
                raise InputError(f"{self.metrics}:{number} is not a step report: {error}; remove the line or the run") from error


def _environment(world_size: int) -> dict[str, object]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "world_size": world_size,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The source's commit, with ``+`` if files were changed; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
