"""Building and reading: same bytes whoever builds, WebDataset reads the same samples, and damage is found by name."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import webdataset

from megatron_omni.audio.codec import Mimi
from megatron_omni.audio.waveform import read_audio, read_flac, resample
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.building.codec_choice import CodecChoice
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.info import AUDIO_RATE, DatasetInfo
from megatron_omni.data.shards.table import ShardTable, write_table
from megatron_omni.data.shards.verify import verify_shards
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.data.sources.manifest import Manifest
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.runtime.files import sha256_file
from megatron_omni.schema import Message, Part, Sample
from tests.data.corpus import CARD, K, copy_of, files_of, flip_bit, make_corpus, save_tiny_mimi, write_manifest, write_wave


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mimi(tmp_path_factory.mktemp("codec") / "tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(corpus: tuple[Path, list[dict[str, Any]]], codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "built"
    summary = build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
    assert (summary.samples, summary.rejected, summary.shards, summary.faults) == (10, 0, 3, [])
    return out


# --------------------------------------------------------------------------- right


def test_samples_come_back_as_the_manifest_has_them(built: Path, corpus: tuple[Path, list[dict[str, Any]]], codec: Path) -> None:
    data = ShardedDataset.open([built])
    entries = Manifest.read(corpus[0]).entries(0, 10)
    mimi = Mimi.from_pretrained(codec)
    assert len(data) == 10 and data.codec == mimi.config()
    for number, (entry, sample) in enumerate(zip(entries, data.samples(), strict=True)):
        arrays = data.arrays(number)
        assert (sample.id, sample.messages, sample.attributes) == (entry.sample.id, entry.sample.messages, entry.sample.attributes)
        assert sample.num_samples == {name: len(wave) for name, wave in arrays.audio.items()}
        assert sample.num_frames == {name: codes.shape[1] for name, codes in arrays.codes.items()}
        for name, clip in entry.audio.items():
            wave = resample(*read_audio(clip.file, clip.start, clip.end), AUDIO_RATE)
            np.testing.assert_allclose(arrays.audio[name], wave.clip(-1, 1), atol=1 / 65536 + 1e-7)
        for name, path in entry.codes.items():
            np.testing.assert_array_equal(arrays.codes[name], np.load(path))
        for name, clip in entry.speech.items():
            alone = mimi.encode([resample(*read_audio(clip.file, clip.start, clip.end), mimi.sample_rate)])[0]
            np.testing.assert_array_equal(arrays.codes[name], alone)
            assert len(np.unique(alone)) > 3  # codes that say something
    assert data.shard_of(3).endswith("shard-000000.tar") and data.shard_of(4).endswith("shard-000001.tar")
    with pytest.raises(IndexError):
        data.sample(10)


def test_webdataset_reads_the_same_samples(built: Path) -> None:
    data = ShardedDataset.open([built])
    urls = sorted(str(path) for path in built.glob("*.tar"))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(theirs) == len(data)
    for number, raw in enumerate(theirs):
        sample, arrays = data.sample(number), data.arrays(number)
        assert raw["__key__"] == sample.id and Sample.from_json(orjson.loads(raw["json"])) == sample
        assert {name for name in raw if name.endswith("flac")} == {f"{name}.flac" for name in arrays.audio}
        for name, wave in arrays.audio.items():
            np.testing.assert_array_equal(read_flac(raw[f"{name}.flac"]), wave)
        for name, codes in arrays.codes.items():
            array = np.load(io.BytesIO(raw[f"{name}.npy"]), allow_pickle=False)
            assert array.dtype == np.uint16 and array.flags.c_contiguous
            np.testing.assert_array_equal(array, codes)


def test_tar_headers_hold_nothing_of_the_machine(built: Path) -> None:
    with tarfile.open(built / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.isreg()) for m in tar} == {(0, 0, 0, "", "", True)}


def test_several_folders_are_one_data_set_and_travel_by_pickle(built: Path, tmp_path: Path, codec: Path) -> None:
    write_wave(tmp_path / "x.wav", 0.2)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": "x", "audio": "x.wav", "text": "x", "task": "answer"}])
    build_shards(manifest, tmp_path / "more", codec, workers=0)
    build_shards(manifest, tmp_path / "text_only", None, workers=0)
    data = pickle.loads(pickle.dumps(ShardedDataset.open([built, tmp_path / "more", tmp_path / "text_only"])))
    assert [sample.id for sample in data.samples()][9:] == ["utt-9", "x", "x"]
    assert data.shard_of(10).endswith("more/shard-000000.tar")
    assert data.fingerprint != ShardedDataset.open([built]).fingerprint
    build_shards(manifest, tmp_path / "other", CodecChoice(codec, num_codebooks=2), workers=0)
    with pytest.raises(InputError, match="one model speaks one codec"):
        ShardedDataset.open([built, tmp_path / "other"])


def test_an_index_is_read_only_when_it_is_needed(built: Path, tmp_path: Path) -> None:
    copy = copy_of(built, tmp_path / "copy")
    (copy / "shard-000002.index").unlink()
    assert ShardedDataset.open([copy]).sample(0).id == "utt-0"


# --------------------------------------------------------------------------- wrong input


def test_faulty_samples_are_rejected_by_line_and_the_others_built(tmp_path: Path, codec: Path) -> None:
    write_wave(tmp_path / "a.wav", 0.3)
    write_wave(tmp_path / "empty.wav", 0.0)
    (tmp_path / "noise.wav").write_bytes(b"no audio at all")
    arrays = {
        "turned": np.zeros((7, K), np.uint16),
        "flat": np.zeros(K, np.uint16),
        "none": np.zeros((K, 0), np.uint16),
        "float": np.zeros((K, 7), np.float32),
        "high": np.full((K, 7), CARD, np.uint16),
        "low": np.full((K, 7), -1),
        "object": np.array([[{}] * 7] * K),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    good = {"audio": "a.wav", "text": "x", "task": "answer"}
    bad = [
        (good | {"audio": "gone.wav"}, "no such audio file"),
        (good | {"audio": "noise.wav"}, "cannot be read as audio"),
        (good | {"audio": "empty.wav"}, "no audio"),
        (good | {"start": 0.2, "end": 9}, "no part of its"),
        (good | {"text": " "}, "empty"),
        (good | {"text": ""}, "empty"),
        (good | {"target_audio": "gone.wav"}, "no such audio file"),
        (good | {"codes": "gone.npy"}, "no such file of codes"),
        (good | {"codes": "noise.wav"}, "cannot be read"),
        (good | {"codes": "turned.npy"}, f"has shape [7, {K}], expected [{K}, frames]"),
        (good | {"codes": "flat.npy"}, "has shape"),
        (good | {"codes": "none.npy"}, "none.npy"),
        (good | {"codes": "float.npy"}, "float32, expected integers"),
        (good | {"codes": "high.npy"}, f"expected 0..{CARD - 1}"),
        (good | {"codes": "low.npy"}, f"expected 0..{CARD - 1}"),
        (good | {"codes": "object.npy"}, "cannot be read"),
    ]
    lines = [good, *(line for line, _ in bad), good]
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": f"u{n}", **line} for n, line in enumerate(lines)])
    summary = build_shards(manifest, tmp_path / "out", codec, samples_per_shard=5, workers=0)
    assert (summary.samples, summary.rejected) == (2, len(bad)) and "88.9%" in summary.faults[0]
    assert [sample.id for sample in ShardedDataset.open([tmp_path / "out"]).samples()] == ["u0", "u17"]
    rejects = [orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines()]
    assert [(reject["line"], reject["id"]) for reject in rejects] == [(n + 1, f"u{n}") for n in range(1, 17)]
    for reject, (_, says) in zip(rejects, bad, strict=True):
        assert says in reject["reason"]
    assert verify_shards(tmp_path / "out").faults == []  # shards without a sample are whole too
    assert build_shards(manifest, tmp_path / "out", codec, 5, workers=0, max_reject_rate=0.9).faults == []
    urls = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    assert len(list(webdataset.WebDataset(urls, shardshuffle=False))) == 2


def test_nothing_is_touched_where_the_input_is_refused(built: Path, corpus: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    out = copy_of(built, tmp_path / "out")
    twice = write_manifest(tmp_path / "m.jsonl", [corpus[1][0], corpus[1][0]])
    with pytest.raises(InputError, match="line 1 too"):
        build_shards(twice, out, None, workers=0)
    with pytest.raises(InputError, match="no codec is given"):
        build_shards(corpus[0], out, None, workers=0)
    with pytest.raises(InputError, match="cannot be loaded"):
        build_shards(corpus[0], out, tmp_path / "no_codec", workers=0)
    assert files_of(out) == files_of(built)


# --------------------------------------------------------------------------- damage


def read_all(folder: Path) -> None:
    data = ShardedDataset.open([folder])
    for number in range(len(data)):
        data.sample(number)
        data.arrays(number)


def test_a_whole_data_set_has_no_faults(built: Path) -> None:
    summary = verify_shards(built)
    assert (summary.faults, summary.samples, summary.shards) == ([], 10, 3)
    read_all(built)


def test_the_reader_sees_a_flipped_bit_of_a_table(built: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("shard-000001.index", "shards.bin", "dataset.json"):
        size = (built / name).stat().st_size
        for trial, byte in enumerate(random.integers(size, size=10).tolist()):
            copy = copy_of(built, tmp_path / f"{name}-{trial}")
            flip_bit(copy / name, byte, trial % 7)
            with pytest.raises((WorkError, InputError), match=name):
                read_all(copy)


def test_the_reader_names_shard_key_and_offset_of_a_flipped_bit(built: Path, tmp_path: Path) -> None:
    with tarfile.open(built / "shard-000001.tar") as tar:
        members = [(member.name, member.offset_data, member.size) for member in tar]
    for name, offset, size in members:
        copy = copy_of(built, tmp_path / name)
        flip_bit(copy / "shard-000001.tar", offset + size // 2)
        with pytest.raises(WorkError, match=f"shard-000001.tar: {name} at offset {offset}: "):
            read_all(copy)
        assert any(f"{name} at offset {offset}" in fault for fault in verify_shards(copy).faults)


def test_a_cut_swapped_or_missing_file_is_found(built: Path, tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        os.truncate(folder / "shard-000000.tar", (folder / "shard-000000.tar").stat().st_size // 2)

    def swap(folder: Path) -> None:
        (folder / "shard-000000.index").write_bytes((folder / "shard-000001.index").read_bytes())

    def lose(folder: Path) -> None:
        (folder / "shard-000000.tar").unlink()

    for damage in (cut, swap, lose):
        copy = copy_of(built, tmp_path / damage.__name__)
        damage(copy)
        with pytest.raises(WorkError, match="shard-000000"):
            read_all(copy)
        assert any("shard-000000" in fault for fault in verify_shards(copy).faults)


def test_an_unfinished_or_foreign_folder_is_refused(built: Path, tmp_path: Path) -> None:
    copy = copy_of(built, tmp_path / "copy")
    info = orjson.loads((copy / "dataset.json").read_bytes())
    (copy / "dataset.json").write_bytes(orjson.dumps(info | {"format_version": 2}))
    with pytest.raises(InputError, match="format_version"):
        ShardedDataset.open([copy])
    (copy / "dataset.json").unlink()
    with pytest.raises(InputError, match="make_shards has finished"):
        ShardedDataset.open([copy])


def test_verify_sees_what_hashes_cannot(built: Path, tmp_path: Path) -> None:
    """A builder that went wrong: all hashes agree, the samples do not."""
    copy = copy_of(built, tmp_path / "copy")
    codes = np.full((K, 7), CARD, np.uint16)
    bad = [
        Sample("utt-0", "answer", "", (Message("assistant", (Part("codes", "codes0"),)),), {}, {"codes0": 7}),
        Sample("long", "answer", "", (Message("assistant", (Part("codes", "codes0"),)),), {}, {"codes0": 8}),
    ]
    with ShardWriter(copy / "shard-000002.tar") as writer:
        for sample in bad:
            writer.add(sample, {}, {"codes0": codes})
    table = ShardTable(copy)
    record = replace(table[2], tar_sha256=writer.tar_sha256, index_sha256=writer.index_sha256, tar_bytes=writer.tar_bytes)
    (copy / "shards.bin").write_bytes(write_table([table[0], table[1], record]))
    info = DatasetInfo.read(copy).model_copy(update={"table_sha256": sha256_file(copy / "shards.bin")})
    (copy / "dataset.json").write_bytes(info.to_json())
    (copy / "extra.tar").write_bytes(b"")
    faults = verify_shards(copy).faults
    for says in (
        "extra.tar: is not in the table of shards",
        f"utt-0.codes0.npy at offset 1536: holds the code {CARD}, expected 0..{CARD - 1}",
        f"is uint16 [{K}, 7], expected uint16 [{K}, 8]",
        "the key 'utt-0' occurs in",
    ):
        assert sum(says in fault for fault in faults) == 1, (says, faults)
    assert len(faults) == 4
    with pytest.raises(WorkError, match=f"holds the code {CARD}"):
        read_all(copy)
