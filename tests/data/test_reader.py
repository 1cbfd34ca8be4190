"""Reading local shards: nothing copied, nothing that grows with the data set, arrays that outlive their shard."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import numpy as np
import orjson
import pytest

from megatron_omni.data.shards import dataset as dataset_module
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.info import DatasetInfo
from megatron_omni.data.shards.sections import TEXT, to_bytes
from megatron_omni.data.shards.shard import Shard
from megatron_omni.data.shards.table import SHARD
from megatron_omni.runtime.errors import WorkError
from tests.data.folders import CODEC, PER_SHARD, codes_of, members_of, npy, sample_of, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set", shards=3)


def test_codes_are_views_of_the_tar(folder: Path) -> None:
    shard = Shard(folder / "shard-000000.tar", uniform=True)
    codes = shard.arrays(shard.index[1], CODEC).codes["codes0"]
    assert not codes.flags.owndata and not codes.flags.writeable and codes.flags.c_contiguous and codes.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        codes[0, 0] = 1
    mapped = np.frombuffer(shard.read(shard.index[1], shard.index[1].members[2]), np.uint8)
    assert np.shares_memory(codes, mapped)


def test_arrays_outlive_their_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "OPEN_SHARDS", 1)
    data = ShardedDataset.open([folder])
    kept = [data.arrays(number) for number in range(len(data))]  # each shard but the last is closed by now
    del data
    gc.collect()
    for number, arrays in enumerate(kept):
        np.testing.assert_array_equal(arrays.codes["codes0"], codes_of(number))


def test_a_closed_shard_leaves_its_arrays(folder: Path) -> None:
    shard = Shard(folder / "shard-000000.tar", uniform=True)
    codes = shard.arrays(shard.index[0], CODEC).codes["codes0"]
    shard.close()
    np.testing.assert_array_equal(codes, codes_of(0))
    with pytest.raises(WorkError):
        shard.sample(shard.index[0])


def test_a_batch_keeps_its_order(folder: Path) -> None:
    data = ShardedDataset.open([folder])
    numbers = [9, 0, 5, 5, 11]
    batch = data.batch(numbers)
    assert [sample for sample, _ in batch] == [sample_of(number) for number in numbers]
    for (_, arrays), number in zip(batch, numbers, strict=True):
        np.testing.assert_array_equal(arrays.codes["codes0"], data.codes(number)["codes0"])
    assert data.batch(np.array([3]))[0][0].id == "s3" and data.key(3) == "s3"
    for wrong in (-1, 12):
        with pytest.raises(IndexError):
            data.sample(wrong)


def test_members_come_as_they_lie(folder: Path) -> None:
    found = list(ShardedDataset.open([folder]).members(6))
    assert [(member.suffix, data, member.length) for member, data in found] == members_of(6)


def test_codes_of_other_writers_may_lie_by_columns(tmp_path: Path) -> None:
    members = [*members_of(2)[:2], ("codes0.npy", npy(np.asfortranarray(codes_of(2))), 6)]
    data = ShardedDataset.open([write_folder(tmp_path / "set", changed={2: ("s2", members)})])
    np.testing.assert_array_equal(data.codes(2)["codes0"], codes_of(2))


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_many_shards_take_little_memory(tmp_path: Path) -> None:
    folder, shards = write_folder(tmp_path / "set"), 200_000
    rows = np.zeros(shards, SHARD)
    names = b"".join(b"shard-%07d.tar" % number for number in range(shards))
    rows["name"] = np.arange(shards)[:, None] * 17 + [0, 17]
    rows["samples"] = PER_SHARD
    table = to_bytes(b"OMNI.TBL", 1, [rows, np.frombuffer(names, TEXT)])
    (folder / "shards.bin").write_bytes(table)
    told = orjson.loads((folder / "dataset.json").read_bytes()) | {"table_sha256": hashlib.sha256(table).hexdigest(), "checksum": ""}
    (folder / "dataset.json").write_bytes(DatasetInfo.model_validate(told).to_json())
    del rows, names, table
    gc.collect()
    before = anonymous_bytes()
    data = ShardedDataset.open([folder])
    assert len(data) == shards * PER_SHARD
    assert data.shard_of(len(data) - 1).endswith("shard-0199999.tar")
    assert anonymous_bytes() - before < 64 * shards  # 8 bytes a shard are kept
