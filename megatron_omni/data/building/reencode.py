"""Encodes a few clips of a finished data set again: are its codes those of the codec, and of the recordings that it names?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_omni.audio.codec import Mimi
from megatron_omni.data.building.options import BuildOptions
from megatron_omni.data.building.prepare import Prepared, prepare
from megatron_omni.data.building.shard import encoded
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.info import DatasetInfo
from megatron_omni.data.sources.line import Entry
from megatron_omni.data.sources.source import Source
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.seeds import rng


@dataclass(frozen=True)
class Reencoded:
    clips: int
    """Encoded again and compared."""
    ties: int
    """Frames that differ by float rounding only."""
    faults: list[str]


def reencode(folder: Path, source: Source, codec: Mimi, count: int, seed: int = 0) -> Reencoded:
    """Compares the codes of about ``count`` random samples with what ``codec`` makes of the recordings in ``source``.

    Only the collection has the answers' recordings: the data set keeps their codes.

    Raises:
        InputError: The codec is not the one that made the codes.
    """
    info, data = DatasetInfo.read(folder), ShardedDataset.open([folder])
    if info.codec is None or info.codec.weights_hash != codec.weights_hash:
        theirs = "no codec" if info.codec is None else f"{info.codec.name} ({info.codec.weights_hash[:12]}...)"
        raise InputError(f"{folder}: was made with {theirs}, the codec given has the weights {codec.weights_hash[:12]}...; give that one")
    options = BuildOptions.model_validate(info.build | {"codec": info.codec})
    numbers = {data.key(number): number for number in range(len(data))}
    clips, ties, faults = 0, 0, []
    for line in rng("reencode", seed).permutation(len(source)).tolist():
        if clips >= count:
            break
        (entry,) = source.entries(line, line + 1)
        if not isinstance(entry, Entry) or not entry.speech or entry.sample.id not in numbers:
            continue
        prepared = prepare(entry, options)
        if not isinstance(prepared, Prepared):
            faults.append(f"{entry.sample.id}: its recording is rejected now: {prepared.reason}")
            continue
        (fresh,) = encoded([prepared], codec)
        assert isinstance(fresh, Prepared)
        stored = data.arrays(numbers[entry.sample.id]).codes
        for name, wave in prepared.waves.items():
            clips += 1
            if stored[name].shape != fresh.codes[name].shape:
                faults.append(f"{entry.sample.id}.{name}: has {stored[name].shape[1]} frames, its recording {fresh.codes[name].shape[1]}")
            elif not np.array_equal(stored[name], fresh.codes[name]):
                found = codec.compare([wave], [stored[name]])
                ties += found.ties
                if found.beyond_ties:
                    faults.append(f"{entry.sample.id}.{name}: {found.beyond_ties} of {found.frames} frames are not those of its recording")
    return Reencoded(clips, ties, faults)
