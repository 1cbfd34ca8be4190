"""Reading samples beside the readers that a user would pick: the same samples, every output compared, then in turns.

Samples of 4 KB are a conversation and its codes. ``decoded`` is what webdataset's ``.decode()`` gives, JSON and arrays; ``samples``
are typed, as training takes them (for webdataset: ``Sample.from_json`` of what it decodes). Ours checks a hash of every member, its tar
header, and every array against the index and the codec; webdataset and Energon check nothing, mosaicml-streaming nothing by default.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import soundfile
import typer
import webdataset
from common import in_turns, median_ratio, write_result

from megatron_omni.audio.waveform import write_flac
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.index import IndexedSample, Member
from megatron_omni.data.shards.info import AUDIO_RATE, CodecProvenance, DatasetInfo, Totals
from megatron_omni.data.shards.shard import Shard
from megatron_omni.data.shards.table import ShardRecord, write_table
from megatron_omni.data.shards.writer import ShardWriter
from megatron_omni.runtime import cli
from megatron_omni.schema import Message, Part, Sample

CODEC = CodecProvenance(name="bench", num_codebooks=8, card=2048, frame_rate=12.5, sample_rate=24_000)
FRAMES = 200
PACKAGES = ("numpy", "orjson", "xxhash", "soundfile", "webdataset", "megatron-energon", "mosaicml-streaming")

Decoded = tuple[dict[str, Any], np.ndarray]
"""JSON and codes of a sample."""


def main(
    samples: Annotated[int, typer.Option(help="of 4 KB")] = 8000,
    clips: Annotated[int, typer.Option(help="of FLAC")] = 40,
    seconds: Annotated[float, typer.Option(help="of a clip")] = 5.0,
    per_shard: int = 2000,
    rounds: Annotated[int, typer.Option(help="of turns; six times as many for the clips, whose passes are short")] = 9,
) -> dict[str, object]:
    """One process, page cache warm. Energon and mosaicml-streaming take part where they can be imported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = write_folder(folder / "small", small_samples(samples), per_shard)
        spoken = write_folder(folder / "spoken", spoken_samples(clips, seconds), per_shard)
        times = {"small": time_small(small, folder, rounds), "spoken": time_spoken(spoken, 6 * rounds)}
    result = {
        "workload": {"samples": samples, "sample_bytes": 4096, "clips": clips, "clip_seconds": seconds, "rounds": rounds},
        "samples_per_second": {
            kind: {reader: round(count / float(np.median(of_reader))) for reader, of_reader in seconds_by.items()}
            for (kind, seconds_by), count in zip(times.items(), (samples, clips), strict=True)
        },
        "ratio": ratios(times["small"]),
        "flac_share_of_soundfile": round(median_ratio(times["spoken"], "soundfile", "ours"), 4),
        "cost_of_checks": {kind: round(median_ratio(by, "ours", "ours unchecked") - 1, 4) for kind, by in times.items()},
        "outputs_equal": True,
    }
    return write_result("read_shards", result, PACKAGES)


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    pairs = {
        "decoded over webdataset": ("webdataset", "ours decoded"),
        "samples over webdataset": ("webdataset samples", "ours"),
        "samples over webdataset's decode alone": ("webdataset", "ours"),
        "decoded over energon": ("energon", "ours decoded"),
        "decoded over mosaicml-streaming": ("mosaicml-streaming", "ours decoded"),
    }
    return {name: round(median_ratio(seconds, *pair), 2) for name, pair in pairs.items() if pair[0] in seconds}


# --------------------------------------------------------------------------- readers


class Unchecked(Shard):
    """As fast as a reader can be that trusts every byte."""

    def read(self, sample: IndexedSample, member: Member) -> memoryview:
        return self._tar[member.offset : member.offset + member.size]


def time_small(folder: Path, work: Path, rounds: int) -> dict[str, list[float]]:
    dataset = ShardedDataset.open([folder])
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    shuffled = np.random.default_rng(1).permutation(len(dataset)).tolist()

    def theirs() -> Iterator[Decoded]:
        for raw in webdataset.WebDataset(urls, shardshuffle=False).decode():
            yield raw["json"], raw["codes0.npy"]

    def shards_of(kind: type[Shard]) -> list[Shard]:
        return [kind(Path(url), uniform=True) for url in urls]

    def ours() -> Iterator[Decoded]:
        for shard in shards_of(Shard):
            for indexed in shard.index:
                yield orjson.loads(shard.read(indexed, indexed.members[0])), shard.arrays(indexed, CODEC).codes["codes0"]

    def unchecked() -> Iterator[object]:
        for shard in shards_of(Unchecked):
            for indexed in shard.index:
                yield shard.sample(indexed), shard.arrays(indexed, CODEC)

    readers: dict[str, Callable[[], object]] = {
        "webdataset": lambda: drain(theirs()),
        "webdataset samples": lambda: drain((Sample.from_json(json), codes) for json, codes in theirs()),
        "ours decoded": lambda: drain(ours()),
        "ours": lambda: drain(map(dataset.both, range(len(dataset)))),
        "ours shuffled": lambda: drain(map(dataset.both, shuffled)),
        "ours unchecked": lambda: drain(unchecked()),
    }
    for name, peer in (("energon", energon), ("mosaicml-streaming", mosaic)):
        with contextlib.suppress(ImportError):
            read = peer(list(theirs()), folder, work)
            require_equal(theirs(), read())
            readers[name] = lambda read=read: drain(read())  # type: ignore[misc]
    require_equal(theirs(), ours())
    for number, (json, codes) in enumerate(theirs()):
        sample, arrays = dataset.both(number)
        assert sample == Sample.from_json(json) and np.array_equal(arrays.codes["codes0"], codes), number
    return in_turns(readers, rounds)


def time_spoken(folder: Path, rounds: int) -> dict[str, list[float]]:
    dataset = ShardedDataset.open([folder])
    clips = [data for number in range(len(dataset)) for member, data in dataset.members(number) if member.kind == "audio"]
    shard = Unchecked(sorted(folder.glob("*.tar"))[0], uniform=True)
    assert len(shard.index) == len(clips)

    def bare() -> Iterator[np.ndarray]:
        for data in clips:
            yield soundfile.read(io.BytesIO(data), dtype="float32")[0]

    for number, wave in enumerate(bare()):
        assert np.array_equal(wave, dataset.arrays(number).audio["audio0"]), number
    readers = {
        "soundfile": lambda: drain(bare()),
        "ours": lambda: drain(map(dataset.both, range(len(dataset)))),
        "ours unchecked": lambda: drain((shard.sample(indexed), shard.arrays(indexed, None)) for indexed in shard.index),
    }
    return in_turns(readers, rounds)


def energon(_: list[Decoded], folder: Path, work: Path) -> Callable[[], Iterator[Decoded]]:
    """Its own preparation of the same tars, read in order as its validation sets are."""
    from megatron.energon import (
        Cooker,
        CrudeSample,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_loader,
        get_val_dataset,
        stateless,
    )
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    copy = work / "energon"
    copy.mkdir()
    names = [path.name for path in sorted(folder.glob("*.tar"))]
    for name in names:
        (copy / name).symlink_to(folder / name)
    parts = [("train", "none"), ("val", ".*"), ("test", "none")]
    WebdatasetPreparator.prepare_dataset(copy, names, split_parts_patterns=parts, shuffle_seed=None, workers=1)
    (copy / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    @stateless
    def cook(sample: CrudeSample) -> dict[str, Any]:
        return {**basic_sample_keys(sample), "json": sample["json"], "codes": sample["codes0.npy"]}

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        cookers = [Cooker(cook)]  # noqa: RUF012

    def read() -> Iterator[Decoded]:
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        for sample in get_loader(get_val_dataset(copy, worker_config=config, batch_size=None, task_encoder=Encoder())):
            yield sample["json"], np.asarray(sample["codes"])

    return read


def mosaic(samples: list[Decoded], _: Path, work: Path) -> Callable[[], Iterator[Decoded]]:
    """The same samples in its own format. It imports torchvision, whose wheel needs CUDA; without, an empty stand-in will do."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(work / "mds"), columns={"json": "json", "codes": "ndarray:uint16"}) as out:
        for json, codes in samples:
            out.write({"json": json, "codes": codes})
    dataset = StreamingDataset(local=str(work / "mds"), shuffle=False, batch_size=1)

    def read() -> Iterator[Decoded]:
        for number in range(len(samples)):
            sample = dataset[number]
            yield sample["json"], sample["codes"]

    return read


def drain(items: Iterator[object]) -> None:
    for _ in items:
        pass


def require_equal(theirs: Iterator[Decoded], ours: Iterator[Decoded]) -> None:
    for number, ((json, codes), (our_json, our_codes)) in enumerate(zip(theirs, ours, strict=True)):
        assert json == our_json and codes.dtype == our_codes.dtype and np.array_equal(codes, our_codes), number


# --------------------------------------------------------------------------- samples


def small_samples(count: int) -> Iterator[tuple[Sample, dict[str, bytes], dict[str, np.ndarray]]]:
    random = np.random.default_rng(0)
    words = ["the", "weather", "is", "beautiful", "today", "what", "a", "wonderful", "new", "position", "three", "five", "one", "two"]
    attributes = {"speaker": "p225", "emotion": "happy", "gender": "female", "age": "adult", "pace": "fast", "accent": "english"}
    for number in range(count):
        question, answer = (" ".join(random.choice(words, 8)) for _ in range(2))
        messages = (
            Message("user", (Part("text", question),)),
            Message("assistant", (Part("text", answer), Part("codes", "codes0"))),
        )
        codes = random.integers(0, CODEC.card, (CODEC.num_codebooks, FRAMES), dtype=np.uint16)
        yield Sample(f"bench-{number:07d}", "converse", "bench", messages, {}, {"codes0": FRAMES}, attributes), {}, {"codes0": codes}


def spoken_samples(count: int, seconds: float) -> Iterator[tuple[Sample, dict[str, bytes], dict[str, np.ndarray]]]:
    """Noise through a falling spectrum, as loud as speech and as hard to compress."""
    random = np.random.default_rng(0)
    size = round(seconds * AUDIO_RATE)
    for number in range(count):
        spectrum = np.fft.rfft(random.normal(0, 1, size)) / np.maximum(1, np.arange(size // 2 + 1) / size * 160)
        wave = np.fft.irfft(spectrum, size) * np.abs(np.sin(np.arange(size) * (2 * np.pi * 3 / AUDIO_RATE)))
        flac = write_flac((0.2 * wave / np.abs(wave).max()).astype(np.float32), AUDIO_RATE)
        messages = (Message("user", (Part("audio", "audio0"),)), Message("assistant", (Part("text", "some words that were said"),)))
        yield Sample(f"clip-{number:07d}", "transcribe", "bench", messages, {"audio0": size}), {"audio0": flac}, {}


def write_folder(folder: Path, samples: Iterator[tuple[Sample, dict[str, bytes], dict[str, np.ndarray]]], per_shard: int) -> Path:
    """A data set as make_shards leaves it."""
    folder.mkdir()
    records, pending = [], list(samples)
    for first in range(0, len(pending), per_shard):
        with ShardWriter(folder / f"shard-{first // per_shard:06d}.tar") as writer:
            for sample in pending[first : first + per_shard]:
                writer.add(*sample)
        count = len(writer.samples)
        records.append(ShardRecord(writer.path.name, writer.tar_sha256, writer.index_sha256, writer.tar_bytes, count, 0, 0, 0))
    table = write_table(records)
    (folder / "shards.bin").write_bytes(table)
    totals = Totals(samples=len(pending), rejected=0, shards=len(records), hours=0, speech_hours=0, bytes=0)
    info = DatasetInfo(
        sample_rate=AUDIO_RATE,
        codec=CODEC,
        totals=totals,
        manifest="bench",
        manifest_xxh3="",
        samples_per_shard=per_shard,
        command="",
        versions={},
        table_sha256=hashlib.sha256(table).hexdigest(),
    )
    (folder / "dataset.json").write_bytes(info.to_json())
    return folder


if __name__ == "__main__":
    cli.command(main)
