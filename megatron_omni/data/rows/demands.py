"""What each sample of a data set takes of a row: computed once from texts and lengths, no audio read, and cached."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.render import demand, render
from megatron_omni.data.rows.plan import WINDOW_ROWS, PlanFingerprint
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.files import atomic_open
from megatron_omni.runtime.logs import get_logger
from megatron_omni.schema import RowShape, Sample, SampleArrays

logger = get_logger(__name__)
_VERSION = 1


class Samples(Protocol):
    """A data set with random access; ``ShardedDataset`` is one."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def codec(self) -> CodecConfig | None: ...

    def __len__(self) -> int: ...

    def sample(self, number: int, /) -> Sample: ...

    def arrays(self, number: int, /) -> SampleArrays: ...


@dataclass(frozen=True, eq=False)
class Demands:
    """Of every sample of a data set."""

    table: np.ndarray
    """int32 [samples, 5], columns as ``plan.RESOURCES``."""
    longest_clip: int
    """Encoder frames of the largest slot of a single clip."""


def measure(samples: Samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, acoustic_delay: int) -> Demands:
    """Renders every sample once; the result is kept in the user's cache directory (``XDG_CACHE_HOME``)."""
    identity = (_VERSION, samples.fingerprint, len(samples), tokenizer.fingerprint, geometry, acoustic_delay)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_omni" / "demands"
    path = cache / f"{xxhash.xxh3_128_hexdigest(repr(identity).encode())}.npy"
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        numbers: Iterable[int] = progress(range(len(samples)), "measuring samples")
        table = np.array([_row(samples.sample(number), tokenizer, geometry, acoustic_delay) for number in numbers], np.int32).reshape(-1, 6)
        try:
            with atomic_open(path) as file:
                np.save(file, table, allow_pickle=False)
        except OSError as error:
            logger.warning("cannot keep the samples' lengths in %s (%s): they are measured again at every start", path, error)
    return Demands(table[:, :5], int(table[:, 5].max(initial=0)))


def plan_fingerprint(
    samples: Samples,
    tokenizer: OmniTokenizer,
    geometry: EncoderGeometry,
    shape: RowShape,
    acoustic_delay: int,
    seed: int,
    window_rows: int = WINDOW_ROWS,
) -> PlanFingerprint:
    """What the rows of this data set depend on, under these settings."""
    row = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(shape).items())
    hop, strides, stack = geometry.hop_length, "x".join(map(str, geometry.conv_strides)), geometry.stack
    encoder = f"hop={hop} strides={strides} stack={stack}"
    return PlanFingerprint(samples.fingerprint, tokenizer.fingerprint, encoder, row, acoustic_delay, seed, window_rows)


def _row(sample: Sample, tokenizer: OmniTokenizer, geometry: EncoderGeometry, acoustic_delay: int) -> tuple[int, ...]:
    rendered = render(sample, tokenizer, geometry)
    clips = [geometry.slot(sample.num_samples[span.name]) for span in rendered.audio]
    return (*dataclasses.astuple(demand(sample, rendered, geometry, acoustic_delay)), max(clips, default=0))
