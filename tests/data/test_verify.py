"""What ``verify_shards`` finds: planted damage of every kind, and clips whose codes are not those of their recordings."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_omni.audio.codec import load_codec
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.building.index_tars import index_tars
from megatron_omni.data.building.reencode import reencode
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.info import CodecProvenance, DatasetInfo
from megatron_omni.data.shards.table import ShardTable, write_table
from megatron_omni.data.shards.verify import verify_shards
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.data.sources.columns import load_columns
from megatron_omni.data.sources.open import open_source
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import sha256_file
from tests.data.corpus import CARD, K, copy_of, flip_bit, make_corpus, save_tiny_mimi, write_wave

Draw = np.random.Generator


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mimi(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, corpus: tuple[Path, list[dict[str, Any]]], codec: Path) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
    return out


def flipped_bit(folder: Path, draw: Draw) -> None:
    """In the tar, its index, the table or the description, in proportion to their sizes but each one often."""
    path = folder / draw.choice(["shard-000001.tar", "shard-000001.index", "shards.bin", "dataset.json"])
    flip_bit(path, int(draw.integers(path.stat().st_size)), int(draw.integers(8)))


def truncated_tar(folder: Path, draw: Draw) -> None:
    path = folder / f"shard-00000{draw.integers(3)}.tar"
    os.truncate(path, int(draw.integers(path.stat().st_size)))


def swapped_index(folder: Path, draw: Draw) -> None:
    one, other = (folder / f"shard-00000{number}.index" for number in draw.permutation(3)[:2])
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def sealed(folder: Path, number: int, tar: bytes | None = None, writer: ShardWriter | None = None) -> None:
    """Makes table and description agree with a changed shard, as a builder that went wrong would leave them."""
    table = ShardTable(folder)
    records = [table[place] for place in range(len(table))]
    path = folder / records[number].name
    if tar is not None:
        path.write_bytes(tar)
        records[number] = replace(records[number], tar_sha256=sha256_file(path), tar_bytes=len(tar))
    if writer is not None:
        hashes = {"tar_sha256": writer.tar_sha256, "index_sha256": writer.index_sha256, "tar_bytes": writer.tar_bytes}
        records[number] = replace(records[number], samples=len(writer.samples), **hashes)
    (folder / "shards.bin").write_bytes(write_table(records))
    info = DatasetInfo.read(folder)
    totals = info.totals.model_copy(update={"samples": sum(record.samples for record in records)})
    info = info.model_copy(update={"table_sha256": sha256_file(folder / "shards.bin"), "totals": totals})
    (folder / "dataset.json").write_bytes(info.to_json())


def missing_member(folder: Path, draw: Draw) -> None:
    """The tar was written again without it, and its hash too."""
    number = int(draw.integers(3))
    data = io.BytesIO()
    with tarfile.open(folder / f"shard-00000{number}.tar") as tar, tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as new:
        members = tar.getmembers()
        lost = int(draw.integers(len(members)))
        for member in members[:lost] + members[lost + 1 :]:
            new.addfile(member, tar.extractfile(member))
    sealed(folder, number, data.getvalue())


def rewritten(folder: Path, draw: Draw, change: Callable[[int, Any, Any], tuple[Any, Any]]) -> None:
    """Shard 2 as ``ShardWriter`` writes it when one of its samples was changed."""
    dataset = ShardedDataset.open([folder])
    with ShardWriter(folder / "shard-000002.tar") as writer:
        chosen = int(draw.integers(8, 10))
        for number in range(8, 10):
            sample, arrays = dataset.sample(number), dataset.arrays(number)
            codes = arrays.codes
            if number == chosen:
                sample, codes = change(number, sample, codes)
            writer.add(sample, {name: b"" for name in ()}, codes)
    sealed(folder, 2, writer=writer)


def duplicated_key(folder: Path, draw: Draw) -> None:
    key = f"utt-{draw.integers(8)}"
    rewritten(folder, draw, lambda _number, sample, codes: (replace(sample, id=key), codes))


def code_at_card(folder: Path, draw: Draw) -> None:
    def change(_number: int, sample: Any, codes: Any) -> tuple[Any, Any]:
        name = next(iter(codes), "codes0")
        array = codes.get(name, np.zeros((K, 5), np.uint16)).copy()
        array[draw.integers(K), draw.integers(array.shape[1])] = CARD
        return replace(sample, num_frames=sample.num_frames | {name: array.shape[1]}), codes | {name: array}

    rewritten(folder, draw, change)


DAMAGES = {
    flipped_bit: "dataset.json|shards.bin|shard-000001",
    truncated_tar: "bytes, its index says|cannot be read",
    swapped_index: "index of another tar|sha256",
    missing_member: "its index says|where the tar has|members|index of another tar",
    duplicated_key: "occurs in",
    code_at_card: f"holds the code {CARD}",
}


def find(damage: Callable[[Path, Draw], None], trials: int, built: Path, folder: Path) -> None:
    for trial in range(trials):
        copy = copy_of(built, folder / str(trial))
        damage(copy, np.random.default_rng(trial))
        try:
            faults = verify_shards(copy).faults
        except InputError as error:
            faults = [str(error)]
        assert re.search(DAMAGES[damage], "\n".join(faults)), (damage.__name__, trial, faults)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found(damage: Callable[[Path, Draw], None], built: Path, tmp_path: Path) -> None:
    find(damage, 4, built, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_in_twenty_trials(damage: Callable[[Path, Draw], None], built: Path, tmp_path: Path) -> None:
    find(damage, 20, built, tmp_path)


def test_processes_find_the_same(built: Path, tmp_path: Path) -> None:
    copy = copy_of(built, tmp_path / "copy")
    truncated_tar(copy, np.random.default_rng(0))
    assert verify_shards(copy, workers=2) == verify_shards(copy)
    assert verify_shards(built, workers=1).faults == []


def test_clips_are_encoded_again(built: Path, corpus: tuple[Path, list[dict[str, Any]]], codec: Path, tmp_path: Path) -> None:
    source, mimi = open_source(corpus[0]), load_codec(codec)
    found = reencode(built, source, mimi, count=10)
    assert found.clips >= 3 and found.faults == []

    folder = tmp_path / "other"
    manifest, lines = make_corpus(folder)
    spoken = next(line for line in lines if "target_audio" in line)
    write_wave(folder / spoken["target_audio"], 0.35, 22_050, seed=99)  # the recordings changed after the build
    found = reencode(built, open_source(manifest), mimi, count=10)
    assert found.faults and spoken["id"] in found.faults[0]
    with pytest.raises(InputError, match="give that one"):
        reencode(built, source, load_codec(save_tiny_mimi(tmp_path / "codec2", seed=1)), count=1)


# --------------------------------------------------------------------------- tars of others


def foreign_tar(path: Path, codes: np.ndarray) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            write_wave(path.with_suffix(".wav"), 0.3, 44_100, number)
            members = {"wav": path.with_suffix(".wav").read_bytes(), "json": b'{"text": "word", "speaker": "s"}'}
            data = io.BytesIO()
            np.save(data, codes)
            members["codes.npy"] = data.getvalue()
            for ending, content in members.items():
                member = tarfile.TarInfo(f"spk/{path.stem}_{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        path.with_suffix(".wav").unlink()


def test_foreign_tars_are_read_where_they_lie(codec: Path, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, CARD, (K, 4), dtype=np.uint16)
    for name in ("a", "b"):
        foreign_tar(tmp_path / f"{name}.tar", codes)
    provenance = CodecProvenance(name="tiny", **load_codec(codec).config().model_dump())
    spoken = load_columns("webdataset").model_copy(update={"codes": "codes.npy", "task": "speech_to_speech"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="give --codec"):
        index_tars([tmp_path / "a.tar"], spoken, None)
    summary = index_tars([tmp_path / "a.tar", tmp_path / "b.tar"], spoken, provenance, tmp_path / "set")
    assert (summary.samples, summary.rejected, summary.shards) == (6, 0, 2)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "set"])  # nothing beside the tars
    dataset = ShardedDataset.open([tmp_path / "set"])
    assert dataset.sample(4).id == "spk-b_1" and dataset.sample(4).messages[1].content[0].value == "word"
    assert dataset.arrays(4).audio["audio0"].shape == (4800,) == (dataset.sample(4).num_samples["audio0"],)
    np.testing.assert_array_equal(dataset.arrays(4).codes["codes0"], codes)
    assert verify_shards(tmp_path / "set").faults == []
    flip_bit(tmp_path / "a.tar", 5000)
    assert any("a.tar" in fault for fault in verify_shards(tmp_path / "set").faults)
