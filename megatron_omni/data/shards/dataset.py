"""A data set on disk or behind a URL, and random access to its samples (shard format v1).

::

    DIR/dataset.json            what it is: format version, codec, totals, how it was built      info.py
    DIR/shards.bin              a record per shard: hashes, sizes, counts                        table.py
    DIR/shard-000000.tar        WebDataset: KEY.json, KEY.audio0.flac, KEY.codes0.npy, ...       shard.py
    DIR/shard-000000.index      where each member lies, its xxh3, its length                     index.py

Nothing but ``dataset.json`` and ``shards.bin`` is read on opening; a shard is mapped when one of its samples is asked for.
Every member that is read is compared with its xxh3. Where a URL is given, ``remote.py`` brings the files.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_omni.config.model import CodecConfig
from megatron_omni.data.shards.folder import Folder, open_folder
from megatron_omni.data.shards.index import IndexedSample, Member
from megatron_omni.data.shards.remote import RemoteOptions
from megatron_omni.data.shards.shard import DamagedError, Shard
from megatron_omni.data.shards.table import ShardRecord
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Sample, SampleArrays

OPEN_SHARDS = 128
"""Tars and indexes kept open."""

Result = TypeVar("Result")


class ShardedDataset:
    """Samples of one or more data sets by number, in the order of the folders, their shards and their tars.

    Pickled and sent to another process, or forked, it opens its own files.
    """

    def __init__(self, places: Sequence[str | Path], remote: RemoteOptions = RemoteOptions()) -> None:
        self._places, self._remote = tuple(places), remote
        if not self._places:
            raise InputError("no folder of shards is given; give at least one that make_shards has written")
        self._folders = [open_folder(place, remote) for place in self._places]
        self.codec = _common_codec(self._folders)
        """The codec of all codes; None where the data sets have none."""
        hashes = hashlib.sha256()
        for folder in self._folders:
            hashes.update(folder.table.rows["tar_sha256"].tobytes())
        self.fingerprint: str = hashes.hexdigest()
        """sha256 over the sha256 of all tars, hex."""
        counts = np.concatenate([folder.table.rows["samples"] for folder in self._folders]).astype(np.int64)
        self._ends = np.cumsum(counts).data
        """Number after the last sample of each shard of all folders."""
        self._first_shards = np.cumsum([0, *(len(folder.table) for folder in self._folders)]).tolist()
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open_shard)
        self._last: tuple[int, int, Shard] | None = None
        """First number, number after the last, and shard of the sample that was read last."""

    @classmethod
    def open(cls, places: Sequence[str | Path], remote: RemoteOptions = RemoteOptions()) -> ShardedDataset:
        """Opens folders or URLs (of any fsspec file system) of what make_shards has written.

        Raises:
            InputError: A folder holds no finished data set, or codes of another codec.
            WorkError: A table is damaged, or a URL cannot be read.
        """
        return cls(places, remote)

    def __reduce__(self) -> tuple[type[ShardedDataset], tuple[Sequence[str | Path], RemoteOptions]]:
        return ShardedDataset, (self._places, self._remote)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    # reading; all raise WorkError where bytes are not those that were written, or do not decode to what the index says

    def sample(self, number: int, /) -> Sample:
        """The conversation; no audio is read."""
        return self._read(number, Shard.sample)

    def arrays(self, number: int, /) -> SampleArrays:
        """The sample's audio and codes, decoded; codes are read-only."""
        return self._read(number, lambda shard, indexed: shard.arrays(indexed, self.codec))

    def codes(self, number: int, /) -> dict[str, np.ndarray]:
        """Of ``arrays``, without decoding the audio."""
        return self._read(number, lambda shard, indexed: shard.arrays(indexed, self.codec, ("codes",)).codes)

    def both(self, number: int, /) -> tuple[Sample, SampleArrays]:
        """``sample`` and ``arrays``, found once."""
        return self._read(number, lambda shard, indexed: (shard.sample(indexed), shard.arrays(indexed, self.codec)))

    def batch(self, numbers: Sequence[int], /) -> list[tuple[Sample, SampleArrays]]:
        """``both`` of each, read in the order in which they lie, remote shards side by side."""
        self.prefetch(numbers)
        read = {number: self.both(number) for number in sorted({int(number) for number in numbers})}
        return [read[int(number)] for number in numbers]

    def samples(self) -> Iterator[Sample]:
        """All, in order."""
        return map(self.sample, range(len(self)))

    def key(self, number: int, /) -> str:
        """The sample's id, from the index alone."""
        return self._read(number, lambda _, indexed: indexed.key)

    def members(self, number: int, /) -> Iterator[tuple[Member, bytes]]:
        """The sample's files as they lie in its tar."""
        return iter(self._read(number, lambda shard, indexed: [(m, bytes(shard.read(indexed, m))) for m in indexed.members]))

    def prefetch(self, numbers: Iterable[int], /) -> None:
        """Begins to bring the remote shards of these samples, in their order; returns at once. Forgets what an earlier call asked for."""
        if not any(folder.remote for folder in self._folders):
            return
        wanted: dict[int, list[ShardRecord]] = {}
        for shard in dict.fromkeys(map(self._shard_number, numbers)):
            folder, record = self._folder_and_record(shard)
            wanted.setdefault(folder, []).append(record)
        for number, records in wanted.items():
            self._folders[number].prefetch(records)

    # what there is

    @property
    def folders(self) -> list[tuple[str, int]]:
        """Place and number of samples of each data set, in order; numbers of samples count through them."""
        return [(folder.place, int(folder.table.rows["samples"].sum())) for folder in self._folders]

    @property
    def shards(self) -> np.ndarray:
        """``SHARD`` records of all folders, in order; a mapped table where there is one folder."""
        rows = [folder.table.rows for folder in self._folders]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def shard_of(self, number: int, /) -> str:
        """Path or URL of the tar that holds the sample."""
        folder, record = self._folder_and_record(self._shard_number(number))
        return f"{self._folders[folder].place}/{record.name}"

    # finding

    def _read(self, number: int, read: Callable[[Shard, IndexedSample], Result]) -> Result:
        shard, indexed = self._find(number)
        try:
            return read(shard, indexed)
        except DamagedError:
            if not self._forget(number):
                raise
        return read(*self._find(number))

    def _find(self, number: int) -> tuple[Shard, IndexedSample]:
        last = self._last
        if last is None or not last[0] <= number < last[1]:
            shard_number = self._shard_number(number)
            shard, end = self._shard(shard_number), self._ends[shard_number]
            self._last = last = end - len(shard.index), end, shard
        return last[2], last[2].index[int(number) - last[0]]

    def _forget(self, number: int) -> bool:
        """Whether the shard is a copy of a remote one; then it is dropped, to be brought again."""
        folder, record = self._folder_and_record(self._shard_number(number))
        if not self._folders[folder].forget(record):
            return False
        self._shard.cache_clear()
        self._last = None
        return True

    def _shard_number(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a data set of {len(self)}")
        return bisect_right(self._ends, number)

    def _folder_and_record(self, shard: int) -> tuple[int, ShardRecord]:
        folder = bisect_right(self._first_shards, shard) - 1
        return folder, self._folders[folder].table[shard - self._first_shards[folder]]

    def _open_shard(self, shard: int) -> Shard:
        folder, record = self._folder_and_record(shard)
        return self._folders[folder].shard(record)


def _common_codec(folders: Sequence[Folder]) -> CodecConfig | None:
    """``InputError`` where two folders differ."""
    codec: CodecConfig | None = None
    for folder in folders:
        theirs = folder.info.codec and folder.info.codec.config()
        codec = codec or theirs
        if theirs not in (None, codec):
            raise InputError(
                f"{folder.place}: its codes are of the codec {theirs}, those of the folders before of {codec}; "
                "one model speaks one codec: leave the folder out, or build it again with the other codec"
            )
    return codec
