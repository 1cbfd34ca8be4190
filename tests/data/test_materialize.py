"""Lazy, saved and materialized rows are the same, tensor for tensor; packed shards are ordinary WebDataset tars."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset

from megatron_omni.config.recipe import MixtureConfig
from megatron_omni.data.rows.demands import Samples
from megatron_omni.data.rows.materialize import MaterializedRows, materialize
from megatron_omni.data.rows.pack import PlannedRows, RowSettings, open_rows, plan_rows, write_rows
from megatron_omni.data.rows.packer import Address, RowPacker
from megatron_omni.data.rows.plan import Plan
from megatron_omni.data.rows.saved import SavedPlan
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.index import ShardIndex
from megatron_omni.data.shards.info import CodecProvenance, DatasetInfo, Totals
from megatron_omni.data.shards.table import ShardRecord, write_table
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.schema import Batch, RowShape

SHAPE = RowShape(seq=44, codec=30, encoder=64, spoken=16, supervised=128)
EPOCHS = range(1, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, memory_samples) -> Path:
    """Shards of conversations of up to three turns, with several audios and spoken answers."""
    samples, base = memory_samples(60), tmp_path_factory.mktemp("shards")
    records = []
    for shard in range(3):
        with ShardWriter(base / f"shard-{shard:06d}.tar") as writer:
            for number in range(20 * shard, 20 * shard + 20):
                arrays = samples.arrays(number)
                writer.add(samples.sample(number), {name: flac(wave) for name, wave in arrays.audio.items()}, arrays.codes)
        sums = [sum(sample.length(kind) for sample in writer.samples) for kind in ("audio", "codes")]
        records.append(ShardRecord(writer.path.name, writer.tar_sha256, writer.index_sha256, writer.tar_bytes, 20, 0, *sums))
    table = write_table(records)
    (base / "shards.bin").write_bytes(table)
    info = DatasetInfo(
        sample_rate=16_000,
        codec=CodecProvenance(name="test", **samples.codec.model_dump()),
        totals=Totals(samples=60, rejected=0, shards=3, hours=0.0, speech_hours=0.0, bytes=0),
        manifest="test",
        manifest_xxh3="",
        samples_per_shard=20,
        command="",
        versions={},
        table_sha256=hashlib.sha256(table).hexdigest(),
    )
    (base / "dataset.json").write_text(info.model_dump_json())
    return base


def flac(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * wave, 16_000, format="FLAC")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def settings(geometry) -> RowSettings:
    mixture = MixtureConfig(tasks={"converse": 1.5})
    return RowSettings(geometry, SHAPE, acoustic_delay=1, seed=5, long_samples="split", mixture=mixture, window_rows=4)


@pytest.fixture(scope="module")
def planned(folder: Path, settings: RowSettings, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PlannedRows:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return plan_rows(ShardedDataset.open([folder]), tokenizer, settings)


@pytest.fixture(scope="module")
def written(planned: PlannedRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plan`` and ``rows`` of two epochs."""
    base = tmp_path_factory.mktemp("written")
    write_rows(planned, EPOCHS, base / "plan")
    saved = SavedPlan.compute(planned.plan, EPOCHS)
    materialize(saved, planned.selection.samples, planned.selection.demands.longest_clip, planned.fingerprint, base / "rows", 7)
    return base


def batches(samples: Samples, plan: Plan, tokenizer, geometry, log_mel) -> list[tuple[tuple[str, ...], Batch]]:
    packer = RowPacker(samples, tokenizer, geometry, log_mel, samples.codec, plan.shape, 1)
    made = []
    for ordinal in range(EPOCHS.start * plan.windows_per_epoch, EPOCHS.stop * plan.windows_per_epoch):
        for row in plan.window(ordinal):
            packed = packer.pack([Address(ordinal, row)])
            made.append((packed.keys[0], packed.batch))
    return made


def test_lazy_saved_and_materialized_rows_are_identical(
    planned, written, folder, settings, tokenizer, geometry, log_mel, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    lazy = open_rows([folder], tokenizer, settings)
    saved = open_rows([folder], tokenizer, settings, written / "plan")
    packed = open_rows([written / "nowhere"], tokenizer, settings, written / "rows")  # it needs no other shards
    assert isinstance(saved.plan, SavedPlan) and isinstance(packed.plan, MaterializedRows)
    assert lazy.fingerprint == saved.fingerprint == packed.fingerprint
    assert lazy.plan.windows_per_epoch == packed.plan.windows_per_epoch > 2
    assert len(planned.selection.split) > 0
    expected, *others = (batches(source.samples, source.plan, tokenizer, geometry, log_mel) for source in (lazy, saved, packed))
    assert len(expected) > 40
    for rows in others:
        assert [keys for keys, _ in rows] == [keys for keys, _ in expected]
        for (_, left), (_, right) in zip(rows, expected, strict=True):
            for field in dataclasses.fields(Batch):
                got, wanted = getattr(left, field.name), getattr(right, field.name)
                assert got.dtype == wanted.dtype and torch.equal(got, wanted), field.name
    for ordinal in range(packed.plan.windows_per_epoch, 2 * packed.plan.windows_per_epoch):
        for mine, own in zip(packed.plan.window(ordinal), lazy.plan.window(ordinal), strict=True):
            assert packed.plan.demands[mine].tolist() == lazy.plan.demands[own].tolist()
    assert packed.demands.longest_clip == lazy.demands.longest_clip


def test_webdataset_reads_a_row_as_one_sample(planned, written) -> None:
    tars = sorted(str(path) for path in (written / "rows").glob("*.tar"))
    assert len(tars) > 1
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    rows = MaterializedRows(written / "rows")
    windows = range(EPOCHS.start * rows.windows_per_epoch, EPOCHS.stop * rows.windows_per_epoch)
    planned_rows = [row for ordinal in windows for row in rows.window(ordinal)]
    assert len(read) == len(planned_rows)
    for number, (sample, row) in enumerate(zip(read, planned_rows, strict=True)):
        assert sample["__key__"] == f"row-{number:09d}"
        assert [sample[f"{place}.json"]["id"] for place in range(len(row))] == [rows.sample(n).id for n in row.tolist()]
        for place, n in enumerate(row.tolist()):
            for name, codes in rows.arrays(n).codes.items():
                assert np.array_equal(sample[f"{place}.{name}.npy"], codes)


def test_rows_travel_to_other_processes(written) -> None:
    rows = MaterializedRows(written / "rows")
    again = pickle.loads(pickle.dumps(rows))
    assert again.sample(3) == rows.sample(3)


def test_refusals_name_what_is_wrong(planned, written, settings, tokenizer, folder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("plan", "rows"):
        with pytest.raises(InputError, match=r"seed: 5 there, 6 now"):
            open_rows([folder], tokenizer, dataclasses.replace(settings, seed=6), written / name)
        with pytest.raises(InputError, match=r"long_samples: split there, drop now"):
            open_rows([folder], tokenizer, dataclasses.replace(settings, long_samples="drop"), written / name)
    with pytest.raises(InputError, match=r"mixture: \w+ there"):
        open_rows([folder], tokenizer, dataclasses.replace(settings, mixture=MixtureConfig()), written / "plan")
    rows = MaterializedRows(written / "rows")
    with pytest.raises(InputError, match=r"holds the rows of epochs 1 to 2, training asks for epoch 3: write more"):
        rows.window(3 * rows.windows_per_epoch)
    with pytest.raises(InputError, match="no packed rows in"):
        MaterializedRows(tmp_path)


def test_damage_is_named(planned, written, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "rows", tmp_path / "rows"))
    index = ShardIndex.open(folder / "rows-000000.index")
    row, member = next((row, m) for row in range(6) for m in index[row].members if m.suffix == "0.audio0.flac")
    data = bytearray((folder / "rows-000000.tar").read_bytes())
    data[member.offset + member.size // 2] ^= 1
    (folder / "rows-000000.tar").write_bytes(data)
    rows = MaterializedRows(folder)
    every = [row for w in range(rows.windows_per_epoch, 2 * rows.windows_per_epoch) for row in rows.window(w)]
    number = int(every[row][0])
    with pytest.raises(WorkError, match=rf"rows-000000\.tar: row-00000000{row}\.0\.audio0\.flac at offset {member.offset}: .*hash"):
        rows.arrays(number)
    rows.arrays(number + len(every[row]))  # the next row is whole
    for suffix in (".index", ".tar"):
        shutil.copy(folder / f"rows-000000{suffix}", folder / f"rows-000001{suffix}")
    with pytest.raises(WorkError, match=r"rows-000001\.tar: is not the shard that rows\.json names"):
        MaterializedRows(folder).sample(int(every[8][0]))


def test_only_shards_can_be_materialized(planned, memory_samples, tmp_path: Path) -> None:
    saved = SavedPlan.compute(planned.plan, range(1))
    with pytest.raises(InputError, match="made of shards, not of MemorySamples"):
        materialize(saved, memory_samples(2000), 8, planned.fingerprint, tmp_path)
    assert not MaterializedRows.is_at(tmp_path)
