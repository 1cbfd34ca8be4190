"""Every kind of fault in shards is found when they are opened or read, and named with shard, key and offset."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import soundfile

from megatron_omni.audio.waveform import write_flac
from megatron_omni.data.building.index_tars import index_tars
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.index import Member, ShardIndex
from megatron_omni.data.shards.info import AUDIO_RATE
from megatron_omni.data.shards.table import ShardTable
from megatron_omni.data.shards.verify import verify_shards
from megatron_omni.data.sources.columns import load_columns
from megatron_omni.runtime.errors import OmniError
from tests.data.corpus import flip_bit
from tests.data.folders import CODEC, FRAMES, WAVE, codes_of, foreign, members_of, npy, sample_of, wave_of, write_folder, write_info

TAR, OTHER = "shard-000001.tar", "shard-000000.tar"
BAD = 5
"""The sample of shard 1 that is damaged."""


def read_all(folder: Path) -> None:
    data = ShardedDataset.open([folder])
    for number in range(len(data)):
        data.both(number)


def member(folder: Path, suffix: str) -> Member:
    (sample,) = [sample for sample in ShardIndex.open(folder / "shard-000001.index") if sample.key == f"s{BAD}"]
    return next(member for member in sample.members if member.suffix == suffix)


def named(suffix: str, offset: int | str = r"\d+") -> str:
    return rf"{TAR}: s{BAD}\.{re.escape(suffix)} at offset {offset}: "


# --------------------------------------------------------------------------- damage to a shard that was right


def flipped(suffix: str, at: Callable[[Member], int]) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        write_folder(folder)
        found = member(folder, suffix)
        flip_bit(folder / TAR, at(found), 3)
        return named(suffix, found.offset)

    return damage


def cut(at: Callable[[Member], int]) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        write_folder(folder)
        os.truncate(folder / TAR, at(member(folder, "audio0.flac")))
        return rf"{TAR}: has \d+ bytes, its index says \d+; .* first member that is not there whole: s{BAD}\.audio0\.flac at offset \d+"

    return damage


def cut_between_samples(folder: Path) -> str:
    write_folder(folder)
    os.truncate(folder / TAR, member(folder, "json").offset - 512)
    return rf"{TAR}: has \d+ bytes, .* first member that is not there whole: s{BAD}\.json at offset \d+"


def zeroed(suffix: str, block: int) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        write_folder(folder)
        found = member(folder, suffix)
        with open(folder / TAR, "r+b") as file:
            file.seek(found.offset + block)
            file.write(bytes(512))
        return named(suffix, found.offset)

    return damage


def member_taken_out(folder: Path) -> str:
    write_folder(folder)
    data = io.BytesIO()
    with tarfile.open(folder / TAR) as tar, tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for found in tar.getmembers():
            if found.name != f"s{BAD}.audio0.flac":
                new.addfile(found, tar.extractfile(found))
    size = (folder / TAR).stat().st_size
    (folder / TAR).write_bytes(data.getvalue().ljust(size, b"\0"))  # of the old size, so that it shows only on reading
    return named("audio0.flac")


def lost_shard(folder: Path) -> str:
    write_folder(folder)
    (folder / TAR).unlink()
    return f"{TAR}: cannot be read"


def lost_index(folder: Path) -> str:
    write_folder(folder)
    (folder / "shard-000001.index").unlink()
    return "shard-000001.index: cannot be read"


def flipped_index(folder: Path) -> str:
    write_folder(folder)
    flip_bit(folder / "shard-000001.index", 200)
    return "shard-000001.index: its bytes do not match its checksum"


def swapped_index(folder: Path) -> str:
    write_folder(folder)
    shutil.copy(folder / "shard-000000.index", folder / "shard-000001.index")
    return "shard-000001.index: is the index of another tar"


def swapped_members(folder: Path) -> str:
    """Two recordings of equal size changed places."""
    write_folder(folder)
    first, second = member(folder, "codes0.npy"), ShardIndex.open(folder / "shard-000001.index")[0].members[2]
    assert first.size == second.size
    data = bytearray((folder / TAR).read_bytes())
    a, b = slice(first.offset, first.offset + first.size), slice(second.offset, second.offset + second.size)
    data[a], data[b] = data[b], data[a]
    (folder / TAR).write_bytes(data)
    return rf"{TAR}: s4\.codes0\.npy at offset {second.offset}: "


# --------------------------------------------------------------------------- a builder that went wrong: all hashes agree


def built_with(suffix: str, content: Callable[[], tuple[bytes, int]], says: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        data, length = content()
        members = {s: (s, d, n) for s, d, n in members_of(BAD)}
        if suffix != "json":  # which tells the same length
            lengths = "num_samples" if suffix.startswith("audio") else "num_frames"
            members["json"] = ("json", json(**{lengths: {suffix.partition(".")[0]: length}})()[0], 0)
        members[suffix] = (suffix, data, length)
        write_folder(folder, changed={BAD: (f"s{BAD}", list(members.values()))})
        return named(suffix) + f".*({says})"

    return damage


def built_as(change: Callable[[], tuple[str, list[tuple[str, bytes, int]]]], says: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        write_folder(folder, changed={BAD: change()})
        return says

    return damage


def codes(array: np.ndarray, length: int = FRAMES, pickled: bool = False) -> Callable[[], tuple[bytes, int]]:
    return lambda: (npy(array, pickled), length)


def audio(wave: np.ndarray, rate: int = AUDIO_RATE, container: str = "FLAC", subtype: str = "PCM_16") -> Callable[[], tuple[bytes, int]]:
    def content() -> tuple[bytes, int]:
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, rate, format=container, subtype=subtype)
        return buffer.getvalue(), WAVE

    return content


def lying_npy() -> tuple[bytes, int]:
    return npy(codes_of(BAD)).replace(b"(4, 6)", b"(4, 9)"), 9


def lying_flac() -> tuple[bytes, int]:
    """Its STREAMINFO promises 2^36 - 1 samples."""
    data = bytearray(write_flac(wave_of(BAD), AUDIO_RATE))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4
    return bytes(data), WAVE


def huge_npy() -> tuple[bytes, int]:
    """A header that asks for 8 TB."""
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (4, 1099511627776), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header, 1 << 40


def json(**changed: Any) -> Callable[[], tuple[bytes, int]]:
    return lambda: (orjson.dumps(sample_of(BAD).to_json() | changed), 0)


def bomb() -> tuple[str, list[tuple[str, bytes, int]]]:
    """A gigabyte of blanks, as a member that webdataset would unpack."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        for _ in range(64):
            file.write(b" " * 2**20)
    return f"s{BAD}", [("json.gz", packed.getvalue(), 0), *members_of(BAD)[1:]]


def code(value: int, dtype: type = np.uint16) -> np.ndarray:
    array = codes_of(BAD).astype(dtype)
    array[2, 3] = value
    return array


def nan_wave() -> np.ndarray:
    wave = wave_of(BAD)
    wave[700] = np.nan
    return wave


def outside(folder: Path) -> str:
    """An index that points behind the tar."""
    write_folder(folder)
    index = ShardIndex.open(folder / "shard-000001.index")
    samples = list(index)
    far = samples[1].members[1]._replace(offset=1 << 40)
    samples[1] = samples[1]._replace(members=(samples[1].members[0], far, samples[1].members[2]))
    (folder / "shard-000001.index").write_bytes(ShardIndex.to_bytes(samples, index.tar_bytes, index.tar_sha256))
    return rf"{TAR}: .* first member that is not there whole: s{BAD}\.audio0\.flac at offset {1 << 40}"


def shard_elsewhere(folder: Path) -> str:
    write_folder(folder)
    table = ShardTable(folder)
    write_info(folder, [table[0], replace(table[1], name="../shard-000001.tar")])
    return r"names the shard '\.\./shard-000001\.tar'"


AT_READING: dict[str, Callable[[Path], str]] = {
    "flip in json": flipped("json", lambda m: m.offset + 30),
    "flip in audio": flipped("audio0.flac", lambda m: m.offset + m.size // 2),
    "flip in codes": flipped("codes0.npy", lambda m: m.offset + m.size - 1),
    "flip in npy header": flipped("codes0.npy", lambda m: m.offset + 20),
    "flip in tar header": flipped("audio0.flac", lambda m: m.offset - 512 + 2),
    "flip in tar checksum": flipped("audio0.flac", lambda m: m.offset - 512 + 150),
    "cut inside a member": cut(lambda m: m.offset + 700),
    "cut at a header": cut(lambda m: m.offset - 512),
    "cut inside a header": cut(lambda m: m.offset - 100),
    "cut between samples": cut_between_samples,
    "zeroed block": zeroed("audio0.flac", 512),
    "zeroed header": zeroed("audio0.flac", -512),
    "member taken out": member_taken_out,
    "members swapped": swapped_members,
    "missing shard": lost_shard,
    "missing index": lost_index,
    "flip in index": flipped_index,
    "index of another tar": swapped_index,
    "index points outside": outside,
    "shard outside the folder": shard_elsewhere,
    "member missing": built_as(lambda: (f"s{BAD}", members_of(BAD)[::2]), named("json") + ".*names arrays of the lengths"),
    "repeated key": built_as(lambda: ("s4", members_of(4)), rf"{TAR}: holds the key 's4' 2 times"),
    "dot in a key": built_as(lambda: (f"s{BAD}.x", members_of(BAD)), rf"{TAR}: holds the key 's{BAD}\.x'"),
    "id of another sample": built_with("json", json(id="x"), "holds the id 'x'"),
    "json not an object": built_with("json", lambda: (b"[1, 2]", 0), "is no sample"),
    "json in bad utf-8": built_with("json", lambda: (b'{"id": "\xff\xfe"}', 0), "is no sample"),
    "unknown task": built_with("json", json(task="rm -rf"), "is of the task"),
    "json of other lengths": built_with("json", json(num_frames={"codes0": FRAMES + 2}), "names arrays of the lengths"),
    "gz bomb": built_as(bomb, named("json.gz") + ".*is no sample"),
    "codes below 0": built_with("codes0.npy", codes(code(-1, np.int16)), "is int16"),
    "code at card": built_with("codes0.npy", codes(code(CODEC.card)), f"holds the code {CODEC.card}, expected 0..{CODEC.card - 1}"),
    "codes of a wrong dtype": built_with("codes0.npy", codes(codes_of(BAD).astype(np.float32)), "is float32"),
    "codes of a wrong K": built_with("codes0.npy", codes(codes_of(BAD)[:3]), r"is uint16 \[3, 6\], expected uint16 \[4, 6\]"),
    "codes of a wrong length": built_with("codes0.npy", codes(codes_of(BAD)[:, :4]), r"is uint16 \[4, 4\], expected uint16 \[4, 6\]"),
    "pickled codes": built_with("codes0.npy", codes(np.array([[{}] * FRAMES] * 4), pickled=True), "is object"),
    "npy header that lies": built_with("codes0.npy", lying_npy, "is no .npy"),
    "npy header that asks for 8 TB": built_with("codes0.npy", huge_npy, "is no .npy"),
    "NaN audio": built_with("audio0.flac", audio(nan_wave(), container="WAV", subtype="FLOAT"), "NaN"),
    "empty audio": built_with("audio0.flac", lambda: (audio(np.zeros(0, np.float32), container="WAV")()[0], 0), "expected some"),
    "audio of a wrong rate": built_with("audio0.flac", audio(wave_of(BAD), 8_000), "1600 samples in 1 channels at 8000 Hz"),
    "stereo audio": built_with("audio0.flac", audio(np.stack([wave_of(BAD)] * 2, 1)), "in 2 channels"),
    "audio of a wrong length": built_with("audio0.flac", audio(wave_of(BAD)[:-200]), "1400 samples"),
    "FLAC header that lies": built_with("audio0.flac", lying_flac, "68719476735 samples"),
    "no audio at all": built_with("audio0.flac", lambda: (b"RIFF" + bytes(60), WAVE), "cannot be read as audio"),
}


@pytest.mark.parametrize("kind", AT_READING)
def test_a_fault_is_found_and_named_at_reading(kind: str, tmp_path: Path) -> None:
    says = AT_READING[kind](tmp_path / "set")
    with pytest.raises(OmniError, match=says):
        read_all(tmp_path / "set")


def test_what_is_right_reads(tmp_path: Path) -> None:
    data = ShardedDataset.open([write_folder(tmp_path / "set")])
    assert [(sample, arrays.codes["codes0"].tolist()) for sample, arrays in data.batch(range(8))] == [
        (sample_of(number), codes_of(number).tolist()) for number in range(8)
    ]
    assert verify_shards(tmp_path / "set").faults == []


def test_a_key_in_two_shards_is_found_by_verify(tmp_path: Path) -> None:
    """No reader of one shard can see it."""
    write_folder(tmp_path / "set", changed={BAD: ("s0", members_of(0))})
    assert any(f"{TAR}: the key 's0' occurs in" in fault and OTHER in fault for fault in verify_shards(tmp_path / "set").faults)


# --------------------------------------------------------------------------- tars of others, when they are indexed


FOREIGN = {
    "interleaved keys": (["a.wav", "b.wav", "a.txt", "b.txt"], "the key 'a' comes again at offset"),
    "repeated keys": (["a.wav", "a.txt", "a.wav", "a.txt"], "the key 'a' comes again at offset"),
    "absolute name": (["/a.wav", "/a.txt"], "'/a.wav' is a link, a device or lies outside"),
    "name with ..": (["../a.wav", "../a.txt"], "lies outside"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_fault_is_found_when_a_foreign_tar_is_indexed(kind: str, tmp_path: Path) -> None:
    names, says = FOREIGN[kind]
    with pytest.raises(OmniError, match=says):
        index_tars([foreign(tmp_path / "a.tar", names)], load_columns("webdataset"), None)


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_refused(link: bytes, tmp_path: Path) -> None:
    with pytest.raises(OmniError, match="is a link"):
        index_tars([foreign(tmp_path / "a.tar", ["a.wav"], link)], load_columns("webdataset"), None)
