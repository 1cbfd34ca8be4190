"""Brings shards before they are asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from megatron_omni.data.shards.table import ShardRecord
from megatron_omni.runtime.errors import OmniError
from megatron_omni.runtime.logs import get_logger

logger = get_logger(__name__)

PREFETCHING = 4
"""Shards brought side by side."""


class Prefetcher:
    """Brings shards in the background, the newest wish first. Its threads end with the process, whatever they wait for."""

    def __init__(self, bring: Callable[[ShardRecord], object]) -> None:
        self._bring = bring
        self._wanted: deque[ShardRecord] = deque()
        self._threads: list[threading.Thread] = []

    def ask(self, records: Sequence[ShardRecord]) -> None:
        """In this order, instead of what was asked for before."""
        self._wanted = deque(records)
        self._threads = [thread for thread in self._threads if thread.is_alive()]  # none of them after a fork
        for _ in range(min(PREFETCHING, len(records)) - len(self._threads)):
            thread = threading.Thread(target=self._work, daemon=True, name="prefetch shards")
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        while True:
            try:
                record = self._wanted.popleft()
            except IndexError:
                return
            try:
                self._bring(record)
            except OmniError as error:  # whoever reads the shard will meet it, and says so
                logger.debug("prefetching %s: %s", record.name, error)
