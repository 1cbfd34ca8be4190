"""The same shards, byte for byte, whoever builds them, in however many processes and parts, and after however many kills."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_omni.data.building import shard
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.building.codec_choice import CodecChoice
from megatron_omni.data.building.pool import in_thread
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.info import DatasetInfo
from megatron_omni.runtime.errors import InputError, WorkError
from tests.data.corpus import copy_of, files_of, flip_bit, make_corpus, save_tiny_mimi, write_manifest, write_wave

Corpus = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mimi(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus, codec: Path) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
    return out


def test_processes_do_not_show(built: Path, corpus: Corpus, codec: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        build_shards(corpus[0], tmp_path / str(workers), codec, samples_per_shard=4, workers=workers)
        assert files_of(tmp_path / str(workers)) == files_of(built)


def test_two_encoding_devices_do_not_show(
    built: Path, corpus: Corpus, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "FIRST_SECONDS", 0.2)  # more groups than devices
    build_shards(corpus[0], tmp_path / "out", CodecChoice(codec, devices=("cpu", "cpu")), samples_per_shard=4, workers=0)
    assert files_of(tmp_path / "out") == files_of(built)


def test_ray_does_not_show(built: Path, corpus: Corpus, codec: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs ray (the extra 'cluster')")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        build_shards(corpus[0], tmp_path / "out", codec, samples_per_shard=4, engine="ray")
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "out") == files_of(built)


def test_parts_are_merged_at_the_end(built: Path, corpus: Corpus, codec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0, part=(1, 2))
    with pytest.raises(WorkError, match=r"shard-000001\.tar: is missing"):
        build_shards(corpus[0], out, codec, samples_per_shard=4, finalize=True)
    assert not (out / "dataset.json").exists()
    summary = build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0, part=(2, 2))
    assert (summary.shards, summary.samples) == (1, 4)
    with pytest.raises(WorkError, match="other inputs"):
        build_shards(corpus[0], out, CodecChoice(codec, num_codebooks=2), samples_per_shard=4, finalize=True)
    for _ in range(2):
        assert build_shards(corpus[0], out, codec, samples_per_shard=4, finalize=True).samples == 10
        assert files_of(out) == files_of(built)
    with pytest.raises(InputError, match=r"part=\(3, 2\)"):
        build_shards(corpus[0], out, codec, part=(3, 2))


def test_two_builders_at_once_do_no_harm(built: Path, corpus: Corpus, codec: Path, tmp_path: Path) -> None:
    # in processes: transformers patches itself while it loads, which two threads must not do at once
    arguments = (corpus[0], tmp_path / "out", codec, 4, 0)
    builders = [multiprocessing.get_context("spawn").Process(target=build_shards, args=arguments) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(200)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert files_of(tmp_path / "out") == files_of(built)


def test_a_restart_builds_what_is_missing_and_only_that(
    built: Path, corpus: tuple[Path, list[dict[str, Any]]], codec: Path, tmp_path: Path
) -> None:
    out = copy_of(built, tmp_path / "out")
    kept = (out / "shard-000001.tar").stat()
    (out / "shard-000000.tar").unlink()
    (out / "shard-000002.receipt.json").unlink()
    (out / ".shard-000000.tar.1.tmp").write_bytes(b"half")
    old = out / ".shard-000002.tar.2.tmp"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
    assert files_of(out) == files_of(built)
    assert (out / "shard-000001.tar").stat().st_ino == kept.st_ino
    assert not old.exists()  # and the other may be the work of another builder


def test_damaged_shards_are_built_again(built: Path, corpus: tuple[Path, list[dict[str, Any]]], codec: Path, tmp_path: Path) -> None:
    out = copy_of(built, tmp_path / "out")
    flip_bit(out / "shard-000000.tar", 600)
    flip_bit(out / "shard-000001.index", 100)
    flip_bit(out / "shard-000002.receipt.json", 20)
    (out / "shards.bin").unlink()
    build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
    assert files_of(out) == files_of(built)


def test_other_inputs_build_again(tmp_path: Path) -> None:
    lines = [{"id": f"u{n}", "audio": "a.wav", "text": "x", "task": "answer"} for n in range(3)]
    write_wave(tmp_path / "a.wav", 0.1)
    out = tmp_path / "out"
    build_shards(write_manifest(tmp_path / "m.jsonl", lines), out, None, samples_per_shard=1, workers=0)
    write_wave(tmp_path / "a.wav", 0.2)  # a recording is corrected, a text too, and a line is dropped
    lines[1]["text"] = "y"
    summary = build_shards(write_manifest(tmp_path / "m.jsonl", lines[:2]), out, None, samples_per_shard=1, workers=0)
    assert summary.shards == 2 and sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    data = ShardedDataset.open([out])
    assert [sample.num_samples["audio0"] for sample in data.samples()] == [3200, 3200]
    assert data.sample(1).messages[1].content[0].value == "y"


def test_options_that_change_codes_are_recorded_and_build_again(corpus: Corpus, codec: Path, tmp_path: Path) -> None:
    build_shards(corpus[0], tmp_path / "out", codec, samples_per_shard=10, workers=0)
    before = (tmp_path / "out" / "shard-000000.tar").stat().st_ino
    build_shards(corpus[0], tmp_path / "out", CodecChoice(codec, dtype="bfloat16", threads=2), samples_per_shard=10, workers=0)
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_ino != before
    recorded = DatasetInfo.read(tmp_path / "out").build
    assert (recorded["dtype"], recorded["codec_threads"], recorded["backend"]) == ("bfloat16", 2, "transformers")
    assert recorded["gate"]["silent"] == {"action": "reject", "limit": -70.0}


def test_a_full_disk_leaves_nothing_wrong(
    built: Path, corpus: Corpus, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    written = shard.ShardWriter._write
    space = [60_000]

    def write(writer: shard.ShardWriter, data: bytes) -> None:
        space[0] -= len(data)
        if space[0] < 0:
            raise OSError(28, "No space left on device")
        written(writer, data)

    with monkeypatch.context() as patched:
        patched.setattr(shard.ShardWriter, "_write", write)
        with pytest.raises(OSError, match="No space left"):
            build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
    left = {path.name for path in out.iterdir()}
    assert left and left <= files_of(built).keys()  # whole shards only, nothing temporary
    build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
    assert files_of(out) == files_of(built)


def test_an_error_in_the_encoding_thread_reaches_the_builder_and_ends_the_thread() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("codec")

    before = threading.active_count()
    made = in_thread(items(), ahead=2)
    assert next(made) == 1
    with pytest.raises(ValueError, match="codec"):
        next(made)
    endless = in_thread(iter(int, 1), ahead=2)
    assert next(endless) == 0
    endless.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def _killed(out: Path, corpus: Corpus, codec: Path, delay: float, workers: int) -> None:
    """Starts the tool and kills it ``delay`` seconds after its first file has appeared."""
    arguments = ["--manifest", corpus[0], "--out", out, "--codec", codec, "--samples-per-shard", 4, "--workers", workers]
    command = [sys.executable, "tools/make_shards.py", *map(str, arguments)]
    tool = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not (out.exists() and any(out.iterdir())) and tool.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(delay)
    family = psutil.Process(tool.pid).children(recursive=True) if tool.poll() is None else []
    tool.send_signal(signal.SIGKILL)
    tool.wait()
    assert not psutil.wait_procs(family, timeout=30)[1]  # nobody lives on


def _kill_and_restart(trials: int, corpus: Corpus, codec: Path, built: Path, folder: Path) -> None:
    draw = random.Random(0)
    states = set()
    for trial in range(trials):
        out = folder / str(trial)
        _killed(out, corpus, codec, draw.uniform(0, 0.15), workers=1 + trial % 2)
        states.add(tuple(sorted(name for name in files_of(out))))
        assert {name for name in files_of(out) if not name.startswith(".")} <= files_of(built).keys()
        build_shards(corpus[0], out, codec, samples_per_shard=4, workers=0)
        finished = {name: data for name, data in files_of(out).items() if not name.startswith(".")}
        assert finished == files_of(built), trial
    print(f"\n{trials} of {trials} kills: the same bytes; {len(states)} different states when killed")


def test_killed_and_started_again(built: Path, corpus: Corpus, codec: Path, tmp_path: Path) -> None:
    _kill_and_restart(2, corpus, codec, built, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times(built: Path, corpus: Corpus, codec: Path, tmp_path: Path) -> None:
    _kill_and_restart(20, corpus, codec, built, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat(codec: Path, tmp_path: Path) -> None:
    """20,000 short clips need what 2,000 need: the builder's own peak, and that of its worker."""
    for number in range(50):
        write_wave(tmp_path / f"{number}.wav", 0.3 + 0.01 * number, 24_000, number)
    peaks = {}
    for count in (2_000, 20_000):
        lines = [
            {"id": f"u{n}", "audio": f"{n % 50}.wav", "text": "x", "task": "answer", "target_audio": f"{n * 7 % 50}.wav"}
            for n in range(count)
        ]
        manifest = write_manifest(tmp_path / f"{count}.jsonl", lines)
        command = [sys.executable, "tools/make_shards.py", "--manifest", manifest, "--out", tmp_path / str(count), "--codec", codec]
        tool = subprocess.Popen([*map(str, command), "--workers", "1"], env=os.environ | {"OMP_NUM_THREADS": "1"})
        peak = 0
        while tool.poll() is None:
            time.sleep(0.05)
            try:
                family = [psutil.Process(tool.pid), *psutil.Process(tool.pid).children(recursive=True)]
                peak = max(peak, sum(process.memory_info().rss for process in family))
            except psutil.NoSuchProcess:
                continue
        assert tool.returncode == 0
        peaks[count] = peak
    print(f"\npeak resident memory: { {count: f'{peak / 2**20:.0f} MiB' for count, peak in peaks.items()} }")
    assert peaks[20_000] <= 1.1 * peaks[2_000]
