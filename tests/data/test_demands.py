"""Lengths are measured once per shard and tokenizer, in processes, and mapped afterwards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.render import demand, render
from megatron_omni.data.rows import demands as module
from megatron_omni.data.rows.demands import Demands, measure
from megatron_omni.data.rows.plan import too_long
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.schema import TASKS, RowShape


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two data sets of three shards each."""
    import soundfile

    base = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    made = []
    for name in ("one", "two"):
        lines = []
        for number in range(12):
            soundfile.write(base / f"{name}{number}.wav", 0.1 * random.standard_normal(int(random.integers(2000, 9000))), 16000)
            text = " ".join(random.choice(["three", "five", "today"], random.integers(1, 5)))
            lines.append(f'{{"id": "{name}{number}", "audio": "{name}{number}.wav", "text": "{text}", "task": "transcribe"}}')
        (base / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        build_shards(base / f"{name}.jsonl", base / name, None, samples_per_shard=4, workers=0)
        made.append(base / name)
    return made


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Ids of the samples that this process renders; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[str] = []

    def spy(sample, *rest):
        seen.append(sample.id)
        return render(sample, *rest)

    monkeypatch.setattr(module, "render", spy)
    return seen


def test_only_what_no_table_has_is_measured(folders, rendered, tokenizer, geometry, tmp_path: Path) -> None:
    one = measure(ShardedDataset.open(folders[:1]), tokenizer, geometry, 0)
    assert rendered == [f"one{number}" for number in range(12)]
    rendered.clear()
    both = ShardedDataset.open(folders[::-1])
    table = measure(both, tokenizer, geometry, 0)
    assert rendered == [f"two{number}" for number in range(12)]
    assert table.table[12:].tolist() == one.table.tolist()
    for number in range(len(both)):
        sample = both.sample(number)
        assert table.table[number].tolist() == list(dataclasses.astuple(demand(sample, render(sample, tokenizer, geometry), geometry, 0)))
    assert table.tasks is not None and set(table.tasks.tolist()) == {TASKS.index("transcribe")}
    assert table.total.tolist() == table.table.sum(0).tolist()
    rendered.clear()
    measure(ShardedDataset.open(folders[:1]), tokenizer, geometry, 0)  # its table went into the larger one
    measure(ShardedDataset.open(folders), tokenizer, geometry, 0)
    assert rendered == []
    assert isinstance(table.table.base, np.memmap)


def test_a_measurement_that_was_cut_short_goes_on(folders, rendered, tokenizer, geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    data = ShardedDataset.open(folders[:1])
    honest = module._save

    def failing(path, pieces, blocks):
        if len(rendered) > 8:
            raise KeyboardInterrupt
        honest(path, pieces, blocks)

    monkeypatch.setattr(module, "_save", failing)
    with pytest.raises(KeyboardInterrupt):
        measure(data, tokenizer, geometry, 0, workers=0)
    rendered.clear()
    monkeypatch.setattr(module, "_save", honest)
    assert len(measure(data, tokenizer, geometry, 0, workers=0).table) == 12
    assert rendered == [f"one{number}" for number in range(8, 12)]


def test_processes_measure_the_same(folders, tokenizer, geometry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CHUNK", 5)
    tables = []
    for workers in (0, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(workers)))
        tables.append(measure(ShardedDataset.open(folders), tokenizer, geometry, 1, workers))
    assert tables[0].table.tolist() == tables[1].table.tolist()
    assert tables[0].longest_clip == tables[1].longest_clip > 0


def test_a_cache_that_cannot_be_written_is_done_without(folders, tokenizer, geometry, monkeypatch, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    table = measure(ShardedDataset.open(folders), tokenizer, geometry, 0)
    assert len(table.table) == 24
    assert "measured again at every start" in caplog.text


def test_long_samples_are_found_block_by_block(folders, rendered, tokenizer, geometry) -> None:
    measured = measure(ShardedDataset.open(folders), tokenizer, geometry, 0)
    for limit in (1, 20, 30, 40, 1000):
        shape = RowShape(limit, 1, 10_000, 1, 1000)
        expected = np.flatnonzero((measured.table > [limit, 1, 10_000, 1, 1000]).any(1)).tolist()
        assert measured.too_long(shape).tolist() == too_long(measured.table, shape).tolist() == expected
    assert Demands(measured.table[:0], 0).too_long(RowShape(1, 1, 1, 1, 1)).tolist() == []
