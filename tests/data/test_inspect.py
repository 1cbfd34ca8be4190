"""Totals, spreads and entropies are those of the samples; the page plays what is stored and what the codes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_omni.audio.codec import load_codec
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.shards import inspect
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.inspect import inspect_shards
from megatron_omni.runtime.errors import InputError
from tests.data.corpus import CARD, K, make_corpus, save_tiny_mimi, write_manifest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    save_tiny_mimi(folder / "codec")
    build_shards(make_corpus(folder)[0], folder / "out", folder / "codec", samples_per_shard=4, workers=0)
    return folder


def test_numbers_are_those_of_the_samples(built: Path) -> None:
    found = inspect_shards(built / "out")
    data = ShardedDataset.open([built / "out"])
    samples = list(data.samples())
    assert (found.samples, found.shards, len(found.entropy)) == (10, 3, K)
    assert {task: of_task.samples for task, of_task in found.tasks.items()} == {
        task: sum(sample.task == task for sample in samples) for task in sorted({sample.task for sample in samples})
    }
    transcribed = [sample for sample in samples if sample.task == "transcribe"]
    seconds = [sample.num_samples["audio0"] / 16_000 for sample in transcribed]
    assert found.tasks["transcribe"].seconds.median == pytest.approx(np.median(seconds))
    assert found.tasks["transcribe"].characters.maximum == 6 and found.tasks["transcribe"].speech_seconds is None
    assert found.hours == pytest.approx(sum(sum(sample.num_samples.values()) for sample in samples) / 16_000 / 3600)
    codes = np.concatenate([array for number in range(10) for array in data.arrays(number).codes.values()], axis=1)
    for codebook, entropy in zip(codes, found.entropy, strict=True):
        share = np.bincount(codebook, minlength=CARD) / codebook.size
        assert entropy == pytest.approx(-sum(p * np.log(p) for p in share if p > 0))


def test_the_page_plays_recordings_and_codes(built: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    inspect_shards(built / "out", page, load_codec(built / "codec"), samples=10)
    text = page.read_text()
    data = ShardedDataset.open([built / "out"])
    arrays = [data.arrays(number) for number in range(10)]
    assert text.count("data:audio/wav;base64,") == sum(len(of.audio) + len(of.codes) for of in arrays)
    assert all(sample.id in text for sample in data.samples())
    assert "http" not in text.split("</script>")[-1]  # nothing is fetched from elsewhere


def test_the_same_shards_give_the_same_page(built: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        inspect_shards(built / "out", tmp_path / name, samples=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_another_codec_is_refused(built: Path, tmp_path: Path) -> None:
    other = load_codec(save_tiny_mimi(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="give --codec codec"):
        inspect_shards(built / "out", tmp_path / "page.html", other)
    assert not (tmp_path / "page.html").exists()


def test_a_large_data_set_is_read_in_part(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspect_shards(built / "out")
    monkeypatch.setattr(inspect, "READ", 5)
    part = inspect_shards(built / "out")
    assert (part.samples, part.hours, part.samples_read) == (whole.samples, whole.hours, 5)
    assert sum(of_task.samples for of_task in part.tasks.values()) == whole.samples


def test_a_data_set_without_samples_or_codec(tmp_path: Path) -> None:
    line = {"id": "lost", "audio": "lost.wav", "text": "word", "task": "transcribe"}
    build_shards(write_manifest(tmp_path / "lost.jsonl", [line]), tmp_path / "out", None, workers=0, max_reject_rate=1.0)
    found = inspect_shards(tmp_path / "out", tmp_path / "page.html")
    assert (found.samples, found.tasks, found.entropy, found.codec) == (0, {}, [], None)
    assert (tmp_path / "page.html").exists()
