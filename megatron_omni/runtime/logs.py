"""Logging: one handler on standard error, informative on rank 0, warnings only on the other ranks."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from megatron_omni.runtime.world import World

ROOT = "megatron_omni"


@functools.cache
def _root() -> logging.Logger:
    """The package's logger, set up once per process; the application's root logger is left alone."""
    rank = World.from_environment().rank
    handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", rich_tracebacks=False)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root = logging.getLogger(ROOT)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
    return root


def get_logger(name: str) -> logging.Logger:
    """The logger of module ``name`` (``__name__``)."""
    root = _root()
    return root if name == ROOT else root.getChild(name.removeprefix(f"{ROOT}."))


def log_to(folder: Path) -> None:
    """Also appends every rank's messages, from INFO up, to ``folder/rank-NNNNN.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{World.from_environment().rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    _root().addHandler(handler)
