"""Builds shards from any collection: decode in processes, encode here or on other devices, write in the background.

Consecutive slices of the collection become one shard each, so a shard is a pure function of its slice, the files named
there and ``BuildOptions``; who builds it, with how many processes, in which part and after how many restarts, does not show.
On a restart a shard whose receipt matches is checked against it and kept. ``dataset.json`` is written when all receipts
are there, so that its presence says: complete.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_omni.audio.codec import Mimi
from megatron_omni.data.building.codec_choice import CodecChoice, encode_group, start_encoding
from megatron_omni.data.building.finish import BuildSummary, finish, summarize
from megatron_omni.data.building.gate import Gate
from megatron_omni.data.building.options import BuildOptions, Decoder
from megatron_omni.data.building.output import Output
from megatron_omni.data.building.pool import in_processes, in_thread
from megatron_omni.data.building.prepare import Prepared
from megatron_omni.data.building.shard import (
    Chunk,
    Group,
    Receipt,
    Slice,
    encoded,
    groups_of,
    inputs_of,
    is_finished,
    prepare_chunk,
    slices_of,
    write_shard,
)
from megatron_omni.data.shards.info import AUDIO_RATE, CodecProvenance
from megatron_omni.data.sources.line import Reject
from megatron_omni.data.sources.open import open_source
from megatron_omni.data.sources.source import Source
from megatron_omni.runtime.cli import Meter, meter
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.logs import get_logger

logger = get_logger(__name__)

Engine = Literal["local", "ray"]

COMPARED = 32
"""Clips that are encoded in float32 too where a lower precision is asked for."""

AHEAD = 32
"""Chunks per process that are decoded ahead of the codec; bounds the memory."""


def build_shards(
    source: Source | str | Path,
    out: str | Path,
    codec: CodecChoice | str | Path | None,
    samples_per_shard: int = 1000,
    workers: int = 1,
    gate: Gate | None = None,
    decoder: Decoder = "soundfile",
    engine: Engine = "local",
    part: tuple[int, int] | None = None,
    finalize: bool = False,
    max_reject_rate: float = 0.05,
) -> BuildSummary:
    """Builds all shards of ``source`` in the folder or URL ``out``, or those that are still missing.

    Samples whose audio, text or codes are at fault are left out and listed in ``out/rejects.jsonl``, warnings too.

    Args:
        codec: None if the collection has no speech to learn.
        workers: Processes that decode; 0: this one does it too. With ``ray`` the cluster decides.
        part: ``(i, n)``, ``i`` from 1: builds every nth shard only, without the end.
        finalize: Builds nothing, and merges what all parts have built.
        max_reject_rate: With a larger share of rejected lines the summary has a fault.

    Raises:
        InputError: The collection or an option is wrong; nothing was built.
        WorkError: A process died, or ``finalize`` finds a shard missing.
    """
    if samples_per_shard < 1 or workers < 0 or not 0 <= max_reject_rate <= 1 or (part is not None and not 1 <= part[0] <= part[1]):
        given = f"samples_per_shard={samples_per_shard}, workers={workers}, max_reject_rate={max_reject_rate}, part={part}"
        raise InputError(f"{given}: expected at least 1, at least 0, a share in 0..1, and a part i/n with i in 1..n")
    collection = open_source(source) if isinstance(source, str | Path) else source
    if codec is None and collection.needs_codec:
        raise InputError(f"{collection.name}: has speech to learn (target_audio or codes) but no codec is given; give --codec")
    choice = CodecChoice(codec) if isinstance(codec, str | Path) else codec
    model = None if choice is None else choice.load(choice.devices[0])
    options = _options(choice, model, gate or Gate(), decoder, samples_per_shard)
    output, slices = Output(out), slices_of(collection, samples_per_shard)
    if finalize:
        return finish(output, collection, options, slices, max_reject_rate)

    mine = slices if part is None else slices[part[0] - 1 :: part[1]]
    inputs = {piece.number: inputs_of(collection, piece, options) for piece in mine}
    missing = [piece for piece in mine if not is_finished(output, piece, inputs[piece.number])]
    if len(missing) < len(mine):
        logger.info("%d of %d shards are finished and whole", len(mine) - len(missing), len(mine))
    if missing:
        output.remove("dataset.json")  # no longer true
    with meter("building shards", sum(piece.stop - piece.start for piece in missing)) as shown:
        if engine == "ray":
            from megatron_omni.data.building.ray_engine import build_with_ray  # optional: ray is not installed everywhere

            receipts = build_with_ray(collection, options, output, missing, inputs, choice)
        else:
            receipts = _build_here(collection, options, output, missing, inputs, choice, model, workers, shown)
        built = list(_watched(receipts, missing, shown, engine))
    if part is not None:
        return summarize([receipt.record for receipt in built], [reject for receipt in built for reject in receipt.rejects], [])
    return finish(output, collection, options, slices, max_reject_rate)


def _options(choice: CodecChoice | None, model: Mimi | None, gate: Gate, decoder: Decoder, samples_per_shard: int) -> BuildOptions:
    if choice is None or model is None:
        return BuildOptions(codec=None, gate=gate, decoder=decoder, samples_per_shard=samples_per_shard)
    return BuildOptions(
        codec=CodecProvenance(name=choice.name, **model.config().model_dump()),
        backend=choice.backend,
        dtype=choice.dtype,
        device=model.device.type,
        codec_threads=choice.threads if model.device.type == "cpu" else 1,
        gate=gate,
        decoder=decoder,
        samples_per_shard=samples_per_shard,
    )


def _build_here(
    source: Source,
    options: BuildOptions,
    out: Output,
    missing: Sequence[Slice],
    inputs: Mapping[int, str],
    choice: CodecChoice | None,
    model: Mimi | None,
    workers: int,
    shown: Meter,
) -> Iterator[Receipt]:
    """Decoding runs in processes ahead of the codec, the codec in a thread or in processes ahead of the writer."""
    chunks = [chunk for piece in missing for chunk in piece.chunks()]
    decoded = in_processes(_decode, chunks, workers, AHEAD, _start_decoding, source, options)

    def results() -> Iterator[tuple[int, Prepared | Reject]]:
        for chunk, items in zip(chunks, decoded, strict=True):
            yield from ((chunk.number, item) for item in items)
            shown.advance(len(items))

    groups = groups_of(results(), 1 if model is None else model.sample_rate)
    if choice is not None and model is not None and options.dtype != "float32":
        groups = _compared(groups, model, choice)
    if choice is None or len(choice.devices) == 1:
        encoding = in_thread(((number, encoded(group, model)) for number, group in groups), ahead=2)
    else:
        devices = multiprocessing.get_context("spawn").Queue()
        for device in choice.devices:
            devices.put(device)
        encoding = in_processes(encode_group, groups, len(choice.devices), 2, start_encoding, choice, devices)
    by_number = {piece.number: piece for piece in missing}
    for number, shard in itertools.groupby(encoding, key=lambda item: item[0]):
        yield write_shard(out, by_number[number], inputs[number], (group for _, group in shard))


def _compared(groups: Iterator[tuple[int, Group]], low: Mimi, choice: CodecChoice) -> Iterator[tuple[int, Group]]:
    """The same groups; says how many codes of the first one differ from those of float32."""
    reported = False
    for number, group in groups:
        waves = [wave for item in group if isinstance(item, Prepared) for wave in item.waves.values()][:COMPARED]
        if waves and not reported:
            reported = True
            found = replace(choice, dtype="float32").load(choice.devices[0]).compare(waves, low.encode(waves))
            text = "%s: %.2f %% of %d codes differ from those of float32 (%d of %d frames, %d of them ties)"
            logger.warning(text, choice.dtype, 100 * found.rate, found.codes, found.differing_frames, found.frames, found.ties)
        yield number, group


_decoder: Callable[[Chunk], Group]
"""Of a decoding process."""


def _start_decoding(source: Source, options: BuildOptions) -> None:
    global _decoder
    _decoder = partial(prepare_chunk, source, options)


def _decode(chunk: Chunk) -> Group:
    return _decoder(chunk)


def _watched(receipts: Iterable[Receipt], missing: Sequence[Slice], shown: Meter, engine: Engine) -> Iterator[Receipt]:
    """Says after each shard how fast it goes."""
    began, hours, rejected = time.monotonic(), 0.0, 0
    for number, receipt in enumerate(receipts, 1):
        hours += receipt.record.wave_samples / AUDIO_RATE / 3600
        rejected += receipt.record.rejected
        speed = hours / (time.monotonic() - began) * 3600
        if engine == "ray":
            shown.advance(receipt.record.samples + receipt.record.rejected)
        shown.note(f"{hours:.1f} audio h, {speed:.0f} h/h, {rejected} rejected")
        text = "shard %d of %d: %.2f audio hours, %.0f audio hours per hour, %d rejected"
        logger.info(text, number, len(missing), hours, speed, rejected)
        yield receipt
