"""Totals, spreads and entropies are those of the samples; the page plays what is stored and what the codes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_omni.audio.codec import load_codec
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.inspect import inspect_shards
from tests.data.corpus import CARD, K, make_corpus, save_tiny_mimi


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
