"""How long until the first rows are there, and what memory it takes, from a million samples to a hundred million.

The data set is simulated: its table names as many shards as asked for, all of which are one file. Everything else is the
real thing: the table and its hashes, the cache of measured lengths (written before the clock starts), mixture,
permutation, windows, workers, decoding. Each size runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import write_result
from rich.console import Console
from rich.table import Table

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.audio.waveform import write_flac
from megatron_omni.config.model import CodecConfig, FeatureConfig
from megatron_omni.data.rows.demands import measure
from megatron_omni.data.rows.pack import RowSettings, open_rows
from megatron_omni.data.rows.packer import RowPacker
from megatron_omni.data.rows.stream import RowStream
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.info import AUDIO_RATE, CodecProvenance, DatasetInfo, Totals
from megatron_omni.data.shards.table import ShardRecord, write_table
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.runtime import cli
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Message, Part, RowShape, Sample

CODEC = CodecConfig(num_codebooks=8, card=2048, frame_rate=12.5, sample_rate=24_000)
GEOMETRY = EncoderGeometry(hop_length=160, conv_strides=(1, 2), stack=4)
SETTINGS = RowSettings(GEOMETRY, RowShape(seq=8192, codec=4096, encoder=28_672, spoken=2048, supervised=4096), acoustic_delay=0, seed=0)
WORDS = ["the", "weather", "is", "beautiful", "today", "and", "it", "will", "stay", "so"]
STREAMS, RANKS, ROWS = 64, 8, 64
"""Virtual streams, data-parallel ranks and rows of a step."""
STEPS = 12


def write_shard(folder: Path, samples: int) -> ShardRecord:
    """Speech of 2 to 16 s, half of it to be said again."""
    random = rng("start")
    with ShardWriter(folder / "shard-000000.tar") as writer:
        for number in range(samples):
            wave = 0.1 * random.standard_normal(int(random.uniform(2, 16) * AUDIO_RATE)).astype(np.float32).cumsum() / 100
            text = " ".join(random.choice(WORDS, int(len(wave) / AUDIO_RATE * 2)))
            codes = {"codes0": random.integers(0, CODEC.card, (8, len(wave) // 1280), dtype=np.uint16)} if number % 2 else {}
            answer = (Part("text", text), *(Part("codes", name) for name in codes))
            messages = (Message("user", (Part("audio", "audio0"),)), Message("assistant", answer))
            frames = {name: array.shape[1] for name, array in codes.items()}
            sample = Sample(f"s{number:04d}", "speech_to_speech", "", messages, {"audio0": len(wave)}, frames)
            writer.add(sample, {"audio0": write_flac(np.clip(wave, -1, 1), AUDIO_RATE)}, codes)
    return ShardRecord("shard-000000.tar", writer.tar_sha256, writer.index_sha256, writer.tar_bytes, samples, 0, 0, 0)


def describe(folder: Path, record: ShardRecord, shards: int) -> None:
    """Makes the folder a data set of ``shards`` shards, all of them the one there is."""
    table = write_table([record] * shards)
    (folder / "shards.bin").write_bytes(table)
    totals = Totals(samples=record.samples * shards, rejected=0, shards=shards, hours=0, speech_hours=0, bytes=0)
    info = DatasetInfo(
        sample_rate=AUDIO_RATE,
        codec=CodecProvenance(name="random", **CODEC.model_dump()),
        totals=totals,
        manifest="simulated",
        manifest_xxh3="",
        samples_per_shard=record.samples,
        command="",
        versions={},
        table_sha256=hashlib.sha256(table).hexdigest(),
    )
    (folder / "dataset.json").write_bytes(info.to_json())


def measure_lengths(folder: Path, tokenizer: Path) -> float:
    began = time.perf_counter()
    measure(ShardedDataset.open([folder]), OmniTokenizer.load(tokenizer), GEOMETRY, SETTINGS.acoustic_delay)
    return time.perf_counter() - began


def start(folder: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """One rank of ``RANKS``: seconds from opening the folder, and megabytes that are not of mapped files."""
    loaded, before = OmniTokenizer.load(tokenizer), own_megabytes()
    began = time.perf_counter()
    rows = open_rows([folder], loaded, SETTINGS)
    opened = time.perf_counter() - began
    packer = RowPacker(
        rows.samples, loaded, GEOMETRY, LogMel(FeatureConfig()), CODEC, SETTINGS.shape, 0, longest_clip=rows.demands.longest_clip
    )
    places = dict(virtual_streams=STREAMS, dp_rank=0, dp_size=RANKS, micro_rows=1)
    one = RowStream(packer, rows.plan, rows.fingerprint, micro_batches=1, num_workers=workers, **places)
    next(iter(one))
    first = time.perf_counter() - began
    steps = iter(RowStream(packer, rows.plan, rows.fingerprint, micro_batches=ROWS // RANKS, num_workers=workers, **places))
    next(steps)
    after_one = own_megabytes()
    for _ in itertools.islice(steps, STEPS):
        pass
    return {
        "samples": len(rows.samples),
        "open_seconds": opened,
        "first_batch_seconds": first,
        "megabytes": after_one - before,
        "more_after_steps": own_megabytes() - after_one,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def own_megabytes() -> float:
    """Memory of this process that no file stands for."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def in_process(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(without_daemon, (function, arguments))


def without_daemon(function: Any, arguments: Any) -> Any:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers of its own
    return function(*arguments)


def main(
    shards: Annotated[str, typer.Option(help="Sizes, in shards of 100 samples, with commas between.")] = "100,10000,1000000",
    workers: Annotated[int, typer.Option(help="Data workers.")] = 1,
) -> dict[str, object]:
    """Starts a stream over data sets of growing size; writes results/start_stream.json."""
    folder = Path(tempfile.mkdtemp(prefix="start_stream"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    results = []
    try:
        train_bpe([" ".join(WORDS)] * 10, folder / "base", 400)
        prepare_tokenizer(folder / "base", folder / "tokenizer")
        record = write_shard(folder, 100)
        describe(folder, record, 1)
        measure_lengths(folder, folder / "tokenizer")
        for count in map(int, shards.split(",")):
            describe(folder, record, count)
            cached = in_process(measure_lengths, folder, folder / "tokenizer")
            in_process(start, folder, folder / "tokenizer", workers)  # the files are in the page cache for all sizes
            results.append(in_process(start, folder, folder / "tokenizer", workers) | {"shards": count, "cache_seconds": cached})
    finally:
        shutil.rmtree(folder)
    table = Table("samples", "shards", "open, s", "first batch, s", "memory, MB", f"more after {STEPS} steps, MB")
    for result in results:
        times = (f"{result[key]:.2f}" for key in ("open_seconds", "first_batch_seconds"))
        memory = (f"{result[key]:.0f}" for key in ("megabytes", "more_after_steps"))
        table.add_row(f"{int(result['samples']):,}", f"{result['shards']:,}", *times, *memory)
    Console(stderr=True).print(table)
    summary: dict[str, object] = {"workers": workers, "streams": STREAMS, "ranks": RANKS, "rows": ROWS, "sizes": results}
    write_result("start_stream", summary, packages=("numpy",))
    return {"largest": results[-1]}


if __name__ == "__main__":
    cli.command(main)
