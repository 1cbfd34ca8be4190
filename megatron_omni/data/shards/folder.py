"""One folder of a data set, wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_omni.data.shards.info import AUDIO_RATE, DatasetInfo
from megatron_omni.data.shards.remote import RemoteFolder, RemoteOptions, local_path, url_of
from megatron_omni.data.shards.shard import Shard
from megatron_omni.data.shards.table import FILE, ShardRecord, ShardTable
from megatron_omni.runtime.errors import WorkError
from megatron_omni.runtime.files import sha256_file


class Folder(Protocol):
    place: str
    """Path or URL."""
    info: DatasetInfo
    table: ShardTable
    remote: bool

    def shard(self, record: ShardRecord) -> Shard:
        """Opened; raises ``WorkError``."""
        ...

    def prefetch(self, records: Sequence[ShardRecord]) -> None:
        """Begins to bring remote shards, and returns."""
        ...

    def forget(self, record: ShardRecord) -> bool:
        """Drops a copy of a remote shard, so that it is brought again; False where the shard is no copy."""
        ...


class LocalFolder:
    remote = False

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self.info = DatasetInfo.read(path)
        if sha256_file(path / FILE) != self.info.table_sha256:
            raise WorkError(f"{path / FILE}: is not the table that dataset.json names; start make_shards again")
        self.table = ShardTable(path)
        self._path = path

    def shard(self, record: ShardRecord) -> Shard:
        return Shard(self._path / record.name, record, uniform=self.info.sample_rate == AUDIO_RATE)

    def prefetch(self, records: Sequence[ShardRecord]) -> None:
        pass

    def forget(self, record: ShardRecord) -> bool:
        return False


def open_folder(place: str | Path, remote: RemoteOptions) -> Folder:
    """Raises ``InputError`` where no finished data set is, ``WorkError`` where its table is damaged or a URL cannot be read."""
    url = url_of(place)
    return LocalFolder(local_path(place)) if url is None else RemoteFolder(url, remote)
