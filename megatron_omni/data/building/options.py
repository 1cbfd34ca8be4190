"""Everything that a shard depends on beside its slice of the collection; recorded in ``dataset.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from megatron_omni.audio.codec import Backend, Precision
from megatron_omni.data.building.gate import Gate
from megatron_omni.data.shards.info import AUDIO_RATE, CodecProvenance

Decoder = Literal["soundfile", "ffmpeg"]


class BuildOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    sample_rate: int = AUDIO_RATE
    codec: CodecProvenance | None
    backend: Backend = "transformers"
    dtype: Precision = "float32"
    device: str = "cpu"
    """Kind of device, ``cpu`` or ``cuda``: codes of two kinds differ in ties."""
    codec_threads: int = 1
    """Of the codec's arithmetic on a CPU."""
    decoder: Decoder = "soundfile"
    gate: Gate = Gate()
    samples_per_shard: int = 1000
