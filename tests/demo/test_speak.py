"""The spoken corpus: a folder as a user would have it, reproducible, without one audio having two targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest
import soundfile

from megatron_omni.demo.speak import DEV_VOICES, HELDOUT_VOICES, TRAIN_VOICES, SpokenCorpus, speak_corpus, trim

SPLITS = ("train", "dev", "heldout_known", "heldout_unseen")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SpokenCorpus:
    return speak_corpus(tmp_path_factory.mktemp("corpus"), num_train=20, num_dev=6, num_heldout=5, workers=2)


def manifest(corpus: SpokenCorpus, split: str) -> list[dict]:
    path: Path = getattr(corpus, split)
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_lines_follow_the_manifest_format(corpus: SpokenCorpus) -> None:
    lines = [line for split in SPLITS for line in manifest(corpus, split)]
    assert len(lines) == corpus.utterances == 36
    assert len({line["id"] for line in lines}) == 36
    for line in lines:
        assert not set(line["id"]) & set("./")
        assert set(line) <= {"id", "audio", "text", "task", "prompt", "target_audio", "attributes"}
        assert (corpus.train.parent / line["audio"]).is_file()
        kind, spoken = line["attributes"]["kind"], line["attributes"]["transcript"]
        if line["task"] == "transcribe":
            assert (line["prompt"], line["text"], "target_audio" in line) == ("Transcribe:", spoken, False)
        else:
            assert "prompt" not in line
            assert (corpus.train.parent / line["target_audio"]).is_file()
            assert line["task"] == ("answer" if kind in ("extraction", "ordinal") else "speech_to_speech")
            assert (line["text"] == spoken) == (line["task"] == "speech_to_speech")
    assert {line["task"] for line in lines} == {"transcribe", "answer", "speech_to_speech"}


def test_no_audio_has_two_targets(corpus: SpokenCorpus) -> None:
    lines = [line for split in SPLITS for line in manifest(corpus, split)]
    assert len({line["audio"] for line in lines}) == len(lines)


def test_unseen_voices_are_unseen(corpus: SpokenCorpus) -> None:
    known = {voice.name for voice in TRAIN_VOICES}
    voices = {split: {line["attributes"]["voice"] for line in manifest(corpus, split)} for split in SPLITS}
    assert voices["train"] | voices["heldout_known"] <= known
    assert voices["heldout_unseen"] <= {voice.name for voice in HELDOUT_VOICES}
    assert voices["dev"] & known
    assert voices["dev"] - known
    variants = [voice.variant for voice in (*TRAIN_VOICES, *DEV_VOICES, *HELDOUT_VOICES)]
    assert len(set(variants)) == len(variants)
    assert len(TRAIN_VOICES) == 40


def test_audio_is_short_and_16_bit(corpus: SpokenCorpus) -> None:
    for line in manifest(corpus, "train"):
        info = soundfile.info(corpus.train.parent / line["audio"])
        assert (info.samplerate, info.subtype, info.channels) == (22050, "PCM_16", 1)
        assert 0.4 < info.duration < 3.5


def test_same_seed_same_bytes_whatever_the_workers(corpus: SpokenCorpus, tmp_path: Path) -> None:
    again = speak_corpus(tmp_path, num_train=20, num_dev=6, num_heldout=5, workers=1)
    folder = corpus.train.parent
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)
    assert again.hours == pytest.approx(corpus.hours)


def test_trim_keeps_a_margin() -> None:
    wave = np.concatenate([np.zeros(5000), np.ones(100), np.zeros(5000)]).astype(np.float32)
    assert len(trim(wave, 22050)) == 100 + 2 * 441
    assert len(trim(np.zeros(300, np.float32), 22050)) == 300
