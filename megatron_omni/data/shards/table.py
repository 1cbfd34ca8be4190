"""``shards.bin``: the table of a data set's shards, mapped, so that it opens at once and stays small at a million shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_omni.data.shards.sections import SPAN, TEXT, Strings, open_sections, text_at, to_bytes
from megatron_omni.runtime.errors import WorkError

FILE = "shards.bin"

_MAGIC, _VERSION = b"OMNI.TBL", 1
SHARD = np.dtype(
    [
        ("name", *SPAN),
        ("tar_sha256", "V32"),
        ("index_sha256", "V32"),
        ("tar_bytes", "<u8"),
        ("samples", "<u4"),
        ("rejected", "<u4"),
        ("wave_samples", "<u8"),
        ("frames", "<u8"),
    ]
)


@dataclass(frozen=True)
class ShardRecord:
    """A row of the table of shards."""

    name: str
    """File name of the tar."""
    tar_sha256: str
    index_sha256: str
    tar_bytes: int
    samples: int
    rejected: int
    """Lines of its slice of the manifest that gave no sample."""
    wave_samples: int
    frames: int


def write_table(records: Sequence[ShardRecord]) -> bytes:
    strings = Strings()
    rows = [
        (
            strings.span(r.name),
            *(bytes.fromhex(r.tar_sha256), bytes.fromhex(r.index_sha256)),
            *(r.tar_bytes, r.samples, r.rejected, r.wave_samples, r.frames),
        )
        for r in records
    ]
    return to_bytes(_MAGIC, _VERSION, [np.array(rows, SHARD), strings.section()])


class ShardTable:
    """The shards of one data set, mapped."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.rows, self._text = open_sections(self._path, _MAGIC, _VERSION, (SHARD, TEXT))
        """``SHARD`` records."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> ShardRecord:
        """``WorkError`` where the name of a shard leads out of the folder."""
        row = self.rows[number]
        name = text_at(self._text, row["name"])
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".tar"):
            raise WorkError(f"{self._path}: names the shard {name!r}, expected the name of a .tar in the same folder; build it again")
        hashes = (row["tar_sha256"].tobytes().hex(), row["index_sha256"].tobytes().hex())
        counts = (int(row[field]) for field in ("tar_bytes", "samples", "rejected", "wave_samples", "frames"))
        return ShardRecord(name, *hashes, *counts)
