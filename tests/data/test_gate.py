"""Rules of the quality gate, and 30 kinds of damaged input through the whole builder: each is named, none is kept in silence."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import soundfile

from megatron_omni.audio import waveform
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.building.gate import Gate
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.sources.open import open_source
from megatron_omni.runtime.errors import InputError
from tests.data.corpus import CARD, K, save_tiny_mimi, write_manifest

RATE = 16_000


def noise(seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (round(seconds * RATE), channels))


def encoded(kind: str, samples: np.ndarray | None = None, subtype: str | None = None, rate: int = RATE) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, noise() if samples is None else samples, rate, format=kind, subtype=subtype)
    return data.getvalue()


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


def wav_rate(rate: int) -> bytes:
    data = bytearray(encoded("WAV"))
    data[24:28] = struct.pack("<I", rate)
    return bytes(data)


def not_finite(value: float) -> bytes:
    samples = noise()
    samples[100] = value
    return encoded("WAV", samples, "FLOAT")


codes = np.random.default_rng(0).integers(0, CARD, (K, 7))

DAMAGED: dict[str, tuple[Callable[[], bytes | None], dict[str, object], str]] = {
    # name: file, what else stands in the line, what the reject says
    "no file": (lambda: None, {}, "no such audio file"),
    "no bytes": (lambda: b"", {}, "cannot be read as audio"),
    "text instead of sound": (lambda: b"hello" * 100, {}, "cannot be read as audio"),
    "header only": (lambda: encoded("WAV")[:44], {}, "is cut"),
    "no samples": (lambda: encoded("WAV", np.zeros((0, 1))), {}, "holds no audio"),
    "cut WAV": (lambda: encoded("WAV")[:-4000], {}, "is cut"),
    "cut FLAC": (lambda: encoded("FLAC")[:-4000], {}, "lost sync"),
    "cut Ogg Vorbis": (lambda: encoded("OGG", np.tile(noise(), (8, 1)))[:-9000], {}, "is cut"),
    "cut MP3": (lambda: encoded("MP3", np.tile(noise(), (8, 1)))[:-3000], {}, "is cut"),
    "flipped bytes in FLAC": (lambda: (d := encoded("FLAC"))[:5000] + bytes(64) + d[5064:], {}, "a.bin"),
    "NaN": (lambda: not_finite(np.nan), {}, "NaN"),
    "infinity": (lambda: not_finite(np.inf), {}, "NaN or infinite"),
    "rate of 0": (lambda: wav_rate(0), {}, "a.bin"),
    "rate of 1 Hz": (lambda: wav_rate(1), {}, "header says 1 Hz"),
    "rate of 3 MHz": (lambda: wav_rate(3_000_000), {}, "header says 3000000 Hz"),
    "silence": (lambda: encoded("WAV", np.zeros((8000, 1))), {}, "gate rule 'silent'"),
    "constant": (lambda: encoded("WAV", np.full((8000, 1), 1e-4)), {}, "gate rule 'silent'"),
    "too short": (lambda: encoded("WAV", noise(0.01)), {}, "gate rule 'short'"),
    "empty text": (lambda: encoded("WAV"), {"text": "  "}, "text of the assistant is empty"),
    "start behind the end": (lambda: encoded("WAV"), {"start": 0.4, "end": 0.2}, "start=0.4, end=0.2"),
    "end behind the file": (lambda: encoded("WAV"), {"end": 9.0}, "is no part of its 0.500 s"),
    "negative start": (lambda: encoded("WAV"), {"start": -1.0}, "start=-1"),
    "no such channel": (lambda: encoded("WAV"), {"channel": 1}, "no channel 1"),
    "codes that are missing": (lambda: encoded("WAV"), {"codes": "gone.npy"}, "no such file of codes"),
    "codes that are empty": (lambda: npy(np.zeros((K, 0), np.uint16)), {"codes": "a.bin"}, "failed encoding"),
    "codes of another K": (lambda: npy(codes[:2]), {"codes": "a.bin"}, f"expected [{K}, frames]"),
    "codes as fractions": (lambda: npy(codes.astype(float)), {"codes": "a.bin"}, "expected integers"),
    "codes at card": (lambda: npy(np.full((K, 3), CARD)), {"codes": "a.bin"}, f"expected 0..{CARD - 1}"),
    "codes below 0": (lambda: npy(codes - CARD), {"codes": "a.bin"}, f"expected 0..{CARD - 1}"),
    "codes in a pickle": (lambda: npy(np.array([{"a": 1}], object)), {"codes": "a.bin"}, "cannot be read as a .npy"),
}


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mimi(tmp_path_factory.mktemp("codec"))


def test_there_are_30() -> None:
    assert len(DAMAGED) == 30


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named_and_the_rest_is_built(kind: str, tmp_path: Path, codec: Path) -> None:
    make, keys, says = DAMAGED[kind]
    (tmp_path / "good.wav").write_bytes(encoded("WAV"))
    damaged = make()
    if damaged is not None:
        (tmp_path / "a.bin").write_bytes(damaged)
    good = {"id": "good", "audio": "good.wav", "text": "hi", "task": "transcribe"}
    audio = "good.wav" if "codes" in keys else "a.bin"
    lines = [good, {"id": "bad", "audio": audio, "text": "hi", "task": "transcribe"} | keys, good | {"id": "last"}]
    summary = build_shards(write_manifest(tmp_path / "m.jsonl", lines), tmp_path / "out", codec, workers=0, max_reject_rate=1.0)
    assert [sample.id for sample in ShardedDataset.open([tmp_path / "out"]).samples()] == ["good", "last"]
    (reject,) = (orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines())
    assert (reject["line"], reject["id"], reject["action"]) == (2, "bad", "reject")
    assert says in reject["reason"]
    assert summary.rules[reject["rule"]].samples == summary.rejected == 1


@pytest.mark.parametrize(
    "form", [("WAV", None), ("FLAC", None), ("OGG", None), ("MP3", None), ("OGG", "OPUS"), ("AIFF", None), ("W64", None)]
)
def test_whole_files_are_not_taken_for_cut_ones(form: tuple[str, str | None], tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(encoded(form[0], noise(3.0), form[1]))
    wave, rate = waveform.read_audio(path)
    assert rate == RATE and abs(len(wave) - 3 * RATE) < 3000


def test_warnings_keep_the_sample_and_are_listed(tmp_path: Path) -> None:
    loud, rest = noise() * 100, noise() + 0.3
    (tmp_path / "loud.wav").write_bytes(encoded("WAV", np.clip(loud, -1, 1)))
    (tmp_path / "rest.wav").write_bytes(encoded("WAV", rest))
    lines = [
        {"id": "loud", "audio": "loud.wav", "text": "hello", "task": "transcribe"},
        {"id": "rest", "audio": "rest.wav", "text": "x" * 100, "task": "transcribe"},
        {"id": "answer", "audio": "loud.wav", "text": "x" * 100, "task": "answer"},
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    summary = build_shards(manifest, tmp_path / "out", None, workers=0)
    assert (summary.samples, summary.rejected) == (3, 0)
    found = [orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines()]
    assert [(reject["id"], reject["rule"], reject["action"]) for reject in found] == [
        ("loud", "clipped", "warn"),
        ("rest", "offset", "warn"),
        ("rest", "dense", "warn"),
        ("answer", "clipped", "warn"),
    ]
    assert summary.rules["clipped"].samples == 2 and summary.rules["clipped"].hours == pytest.approx(1 / 3600)

    strict = build_shards(
        open_source(manifest), tmp_path / "strict", None, workers=0, gate=Gate().changed(["clipped=reject", "offset=off"])
    )
    assert (strict.samples, strict.rejected, sorted(strict.rules)) == (1, 2, ["clipped", "dense"])
    assert strict.faults and "66.7%" in strict.faults[0]


@pytest.mark.parametrize("setting", ["loud=warn", "silent=never", "silent", "silent=warn:much"])
def test_settings_that_make_no_sense_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match=f"gate '{setting}'"):
        Gate().changed([setting])


def test_ffmpeg_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("WAV"))
    manifest = write_manifest(tmp_path / "m.jsonl", [{"id": "a", "audio": "a.wav", "text": "x", "task": "answer"}])
    monkeypatch.setattr(waveform.shutil, "which", lambda _: None)
    build_shards(manifest, tmp_path / "out", None, workers=0, decoder="ffmpeg")
    (reject,) = (orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines())
    assert "ffmpeg is not installed" in reject["reason"]


def test_ffmpeg_s_wave_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in program that writes a WAV whatever it is given, as ffmpeg does for formats that libsndfile does not know."""
    (tmp_path / "ffmpeg.wav").write_bytes(encoded("WAV", noise(0.25), "FLOAT"))
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\ncase \"$*\" in *broken*) echo 'Invalid data' >&2; exit 1;; esac\ncat {tmp_path / 'ffmpeg.wav'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("good.m4a", "broken.m4a"):
        (tmp_path / name).write_bytes(b"aac")
    lines = [{"id": name[:4], "audio": name, "text": "x", "task": "answer"} for name in ("good.m4a", "broken.m4a")]
    build_shards(write_manifest(tmp_path / "m.jsonl", lines), tmp_path / "out", None, workers=0, decoder="ffmpeg")
    dataset = ShardedDataset.open([tmp_path / "out"])
    assert [dataset.sample(n).num_samples for n in range(len(dataset))] == [{"audio0": 4000}]
    (reject,) = (orjson.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_bytes().splitlines())
    assert reject["id"] == "brok" and "Invalid data" in reject["reason"]
