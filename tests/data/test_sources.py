"""Collections in their public layouts, made small: every adapter gives the same kind of entry, and builds."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import orjson
import pytest
import soundfile

from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.sources.columns import PRESETS, load_columns
from megatron_omni.data.sources.line import Embedded, Entry, Reject
from megatron_omni.data.sources.open import open_source
from megatron_omni.data.sources.source import Source
from megatron_omni.runtime.errors import InputError
from tests.data.corpus import CARD, K, save_tiny_mimi, write_manifest, write_wave


def entry(source: Source, number: int = 0) -> Entry:
    source = pickle.loads(pickle.dumps(source))  # as the processes that decode get it
    (found,) = source.entries(number, number + 1)
    assert isinstance(found, Entry), found
    return found


def texts(found: Entry) -> list[str]:
    return [part.value for message in found.sample.messages for part in message.content if part.type == "text"]


def flac(seed: int = 0, rate: int = 16_000) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(seed).normal(0, 0.1, rate // 2), rate, format="FLAC")
    return data.getvalue()


def save(folder: Path, rows: list[dict[str, Any]], **features: Any) -> Path:
    dataset = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    dataset.save_to_disk(folder)
    return folder


def build(source: Source, out: Path, codec: Path | None = None) -> ShardedDataset:
    assert build_shards(source, out, codec, workers=0, max_reject_rate=1.0).faults == []
    return ShardedDataset.open([out])


def test_libritts_folder(tmp_path: Path) -> None:
    for speaker, chapter, name in ((84, 121123, "000000_000000"), (174, 50561, "000003_000001")):
        stem = tmp_path / "LibriTTS" / str(speaker) / str(chapter) / f"{speaker}_{chapter}_{name}"
        write_wave(stem.with_suffix(".wav"), 0.5, 24_000, speaker)
        stem.with_suffix(".original.txt").write_text("Go, DON'T you hear?")
        stem.with_suffix(".normalized.txt").write_text(f"Go {speaker}.\n")
    source = open_source(tmp_path / "LibriTTS")
    assert [entry(source, n).sample.id for n in range(2)] == ["174-50561-174_50561_000003_000001", "84-121123-84_121123_000000_000000"]
    assert texts(entry(source, 1)) == ["Transcribe:", "Go 84."]
    assert build(source, tmp_path / "out").sample(1).num_samples == {"audio0": 8000}


def test_folder_with_json_and_a_task(tmp_path: Path) -> None:
    write_wave(tmp_path / "calls" / "a.b.wav", 0.3)
    (tmp_path / "calls" / "a.b.json").write_bytes(orjson.dumps({"text": "hello", "speaker": "anna"}))
    found = entry(open_source(tmp_path / "calls", task="converse"))
    assert (found.sample.id, found.sample.task, texts(found), found.sample.attributes) == (
        "a-b",
        "converse",
        ["hello"],
        {"speaker": "anna"},
    )
    write_wave(tmp_path / "calls" / "a-b.wav", 0.3)
    with pytest.raises(InputError, match="would both have the id 'a-b'"):
        open_source(tmp_path / "calls")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no recording"):
        open_source(tmp_path / "empty")


def test_nemo_manifest(tmp_path: Path) -> None:
    write_wave(tmp_path / "long.wav", 2.0)
    lines = [{"audio_filepath": "long.wav", "text": f"part {n}", "duration": 0.5, "offset": 0.5 * n} for n in range(3)]
    lines.append({"audio_filepath": "long.wav", "duration": 0.5})
    source = open_source(write_manifest(tmp_path / "train.json", lines), "nemo")
    clip = entry(source, 1).audio["audio0"]
    assert (clip.file, clip.start, clip.end) == (tmp_path / "long.wav", 0.5, 1.0)
    assert isinstance(found := source.entries(3, 4)[0], Reject) and "nothing to learn" in found.reason
    dataset = build(source, tmp_path / "out")
    assert [dataset.sample(n).num_samples["audio0"] for n in range(3)] == [8000, 8000, 8000]


def test_lhotse_cuts(tmp_path: Path) -> None:
    """Written and described by lhotse itself."""
    lhotse = pytest.importorskip("lhotse", reason="needs lhotse, which writes the manifest")
    write_wave(tmp_path / "call.wav", 2.0, channels=2)
    recording = lhotse.Recording.from_file(tmp_path / "call.wav")
    cuts = []
    for channel in range(2):
        said = [
            lhotse.SupervisionSegment(f"s{channel}-{n}", "call", 0.5 * n, 0.4, channel, text=f"words {n}", speaker=f"spk{channel}")
            for n in range(2)
        ]
        cuts.append(lhotse.MonoCut(f"cut-{channel}", 0.25, 1.0, channel, supervisions=said, recording=recording))
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    source = open_source(tmp_path / "cuts.jsonl.gz", "lhotse")
    found = entry(source, 1)
    clip = found.audio["audio0"]
    assert (clip.start, clip.end, clip.channel) == (0.25, 1.25, 1)
    assert (texts(found)[1], found.sample.attributes["speaker"]) == ("words 0 words 1", "spk1")
    dataset = build(source, tmp_path / "out")
    stereo, _ = soundfile.read(tmp_path / "call.wav", dtype="float32")
    assert dataset.sample(0).num_samples == {"audio0": 16000}
    assert not np.array_equal(dataset.arrays(0).audio["audio0"], dataset.arrays(1).audio["audio0"])
    assert stereo.shape[1] == 2


def test_gzipped_manifest_of_ours(tmp_path: Path) -> None:
    lines = b"".join(orjson.dumps({"id": f"u{n}", "audio": "a.wav", "text": "x", "task": "answer"}) + b"\n" for n in range(3))
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(lines))
    source = open_source(tmp_path / "m.jsonl.gz")
    assert [entry(source, n).sample.id for n in (2, 0)] == ["u2", "u0"]
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        open_source(tmp_path / "m.jsonl.gz")


def test_ami(tmp_path: Path) -> None:
    rows = [
        {
            "meeting_id": "EN2001a",
            "audio_id": f"AMI_EN2001a_{n}",
            "text": "OKAY.",
            "audio": {"bytes": flac(n), "path": f"{n}.flac"},
            "begin_time": 1.5,
            "end_time": 2.0,
            "microphone_id": "H00",
            "speaker_id": "MEE068",
        }
        for n in range(3)
    ]
    source = open_source(save(tmp_path / "ami", rows, audio=datasets.Audio(16_000)), columns="ami")
    found = entry(source, 2)
    assert isinstance(found.audio["audio0"].file, Embedded)
    assert (found.sample.id, found.sample.attributes) == ("AMI_EN2001a_2", {"speaker": "MEE068", "meeting": "EN2001a"})
    assert build(source, tmp_path / "out").sample(2).num_samples == {"audio0": 8000}


def test_heysquad_refuses_unanswerable_questions(tmp_path: Path) -> None:
    answers = [{"text": ["Denver Broncos", "Broncos"], "answer_start": [177, 1]}, {"text": [], "answer_start": []}]
    rows = [
        {
            "id": f"q{n}",
            "title": "Super_Bowl",
            "context": "c",
            "question": "Who?",
            "answers": answers[n],
            "audio": {"bytes": flac(n), "path": None},
        }
        for n in range(2)
    ]
    source = open_source(save(tmp_path / "squad", rows), columns="heysquad")
    assert texts(entry(source)) == ["denver broncos"]
    (rejected,) = source.entries(1, 2)
    assert isinstance(rejected, Reject) and rejected.id == "q1" and "nothing to learn" in rejected.reason


def test_sift_modes_are_tasks(tmp_path: Path) -> None:
    modes = ("sift_s", "sift_ssp", "sit_ssp", "other")
    rows = [
        {
            "audio": {"bytes": flac(n), "path": None},
            "mode": mode,
            "sift_response": "Sounds like rain.",
            "text": "rain",
            "emotion": "nan",
            "age": "adult",
        }
        for n, mode in enumerate(modes)
    ]
    source = open_source(save(tmp_path / "sift", rows), columns="sift")
    assert [entry(source, n).sample.task for n in range(3)] == ["converse", "empathize", "describe"]
    assert entry(source).sample.attributes == {"transcript": "rain", "age": "adult"}
    assert texts(entry(source, 2))[0] == "Describe all information you can hear:"
    (rejected,) = source.entries(3, 4)
    assert isinstance(rejected, Reject) and "'other'" in rejected.reason


def test_libritts_mimi_takes_ready_codes_and_refuses_failures(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, CARD, (K, 7))
    good = {"audio": {"bytes": flac(), "path": None}, "text_normalized": "Hi.", "text": "hi", "speaker_id": 7, "chapter_id": 1}
    rows = [good | {"codes": codes.tolist()}, good | {"codes": [[]] * K}, good | {"codes": []}, good | {"codes": codes[:2].tolist()}]
    source = open_source(save(tmp_path / "mimi", rows, audio=datasets.Audio(24_000)), columns="libritts-mimi")
    assert texts(entry(source)) == ["Hi."]
    summary = build_shards(source, tmp_path / "out", save_tiny_mimi(tmp_path / "codec"), workers=0, max_reject_rate=1.0)
    assert (summary.samples, summary.rejected) == (1, 3)
    dataset = ShardedDataset.open([tmp_path / "out"])
    np.testing.assert_array_equal(dataset.arrays(0).codes["codes0"], codes)
    rejects = [orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines()]
    assert [reject["id"] for reject in rejects] == ["000000002", "000000003", "000000004"]
    assert all("empty" in reject["reason"] for reject in rejects[:2])


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    rows = [{"wav": {"bytes": flac(n), "path": None}, "text": f"t{n}", "ID": f"a{n}", "spk_id": "s", "sex": "f"} for n in range(7)]
    for part in range(2):
        (tmp_path / "clean").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows[4 * part : 4 * part + 4]).to_parquet(tmp_path / "clean" / f"{part}.parquet", batch_size=3)
    source = open_source(tmp_path / "clean", columns="loquacious")
    assert len(source) == 7
    assert [found.sample.id for found in source.entries(2, 6) if isinstance(found, Entry)] == ["a2", "a3", "a4", "a5"]
    assert texts(entry(source, 6))[1] == "t6"
    data = (tmp_path / "clean" / "1.parquet").read_bytes()
    (tmp_path / "clean" / "1.parquet").write_bytes(data[:-20])
    with pytest.raises(InputError, match=r"1\.parquet: is no whole parquet file"):
        open_source(tmp_path / "clean", columns="loquacious")


def test_dictionaries_of_splits(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([{"id": "a", "audio": {"bytes": flac(), "path": None}, "text": "x"}])
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    assert len(open_source(tmp_path / "both", columns="ami", split="test")) == 1
    with pytest.raises(InputError, match="no split 'dev'; name one of train, test"):
        open_source(tmp_path / "both", columns="ami", split="dev")
    with pytest.raises(InputError, match="needs --columns"):
        open_source(tmp_path / "both")


def test_webdataset_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for key, members in {
            "a/x": {"flac": flac(), "txt": b"hello"},
            "b": {"flac": flac(1), "json": b'{"text": "bye", "speaker": "s"}'},
        }.items():
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = open_source(tmp_path / "train-0.tar")
    assert [entry(source, n).sample.id for n in range(2)] == ["a-x", "b"]
    assert texts(entry(source, 1)) == ["Transcribe:", "bye"]
    assert build(source, tmp_path / "out").sample(0).num_samples == {"audio0": 8000}


@pytest.mark.parametrize("fault", ["cut", "link", "twice", "outside"])
def test_broken_tars_are_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "b.txt", "a.txt" if fault == "twice" else "../c.txt" if fault == "outside" else "c.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes(1000)))
        if fault == "link":
            member = tarfile.TarInfo("d.txt")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:2600])
    says = {"cut": "download it again", "link": "is a link", "twice": "comes again", "outside": "lies outside"}[fault]
    with pytest.raises(InputError, match=says):
        open_source(path)


def test_columns_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("audio: wav\ntext: 'a.b[1] | transcription'\ntask: transcribe\nattributes: {mood: feeling}\n")
    lines = [
        {"wav": "x.wav", "a": {"b": ["no", "yes"]}, "feeling": "happy"},
        {"wav": "y.wav", "transcription": "plain", "feeling": "unknown"},
    ]
    source = open_source(write_manifest(tmp_path / "m.jsonl", lines), columns=tmp_path / "my.yaml")
    assert [texts(entry(source, n))[1] for n in range(2)] == ["yes", "plain"]
    assert [entry(source, n).sample.attributes for n in range(2)] == [{"mood": "happy"}, {}]
    (tmp_path / "my.yaml").write_text("audoi: wav\ntask: transcribe\n")
    with pytest.raises(InputError, match="audoi"):
        load_columns(tmp_path / "my.yaml")
    with pytest.raises(InputError, match="the presets are ami"):
        load_columns("nosuch")


def test_every_preset_loads_and_says_what_was_not_seen() -> None:
    presets = {path.stem: load_columns(path.stem) for path in PRESETS.glob("*.yaml")}
    assert {"ami", "heysquad", "loquacious", "sift", "libritts-mimi", "nemo", "lhotse"} <= presets.keys()
    assert "mode" in presets["sift"].unverified and "audio" in presets["heysquad"].unverified
    assert presets["libritts-mimi"].needs_codec and not presets["ami"].needs_codec


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    """A manifest and its recordings in fsspec's memory, shards written there too."""
    import fsspec

    fs = fsspec.filesystem("memory")
    write_wave(tmp_path / "a.wav", 0.5)
    fs.pipe_file("/in/wavs/a.wav", (tmp_path / "a.wav").read_bytes())
    fs.pipe_file("/in/m.jsonl", orjson.dumps({"id": "a", "audio": "wavs/a.wav", "text": "x", "task": "transcribe"}) + b"\n")
    source = open_source("memory://in/m.jsonl")
    assert build_shards(source, "memory://out/set", None, workers=0).samples == 1
    fs.get("/out/set", str(tmp_path / "got"), recursive=True)
    assert build_shards(source, tmp_path / "here", None, workers=0).samples == 1
    for file in (tmp_path / "here").iterdir():
        assert (tmp_path / "got" / file.name).read_bytes() == file.read_bytes(), file.name
    assert build_shards(source, "memory://out/set", None, workers=0).samples == 1  # finished: verified and kept
