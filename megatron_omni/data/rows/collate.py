"""Packed rows as tensors: every index that the model needs is built here, on the CPU, in static shapes (``schema.Batch``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_omni.audio.delay import NO_CODE, delay_codes
from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.render import demand
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.schema import IGNORE, Batch, Demand, Rendered, RowShape, Sample, SampleArrays, SpeechSpan

Packed = tuple[Sample, Rendered, SampleArrays]
"""All that a row needs of one of its samples."""

Distort = Callable[[int, Sample, str, np.ndarray], np.ndarray]
"""Row, sample and name of a clip, and its log-mel [A, M]; returns one of the same shape."""


def collate(
    rows: Sequence[Sequence[Packed]],
    shape: RowShape,
    geometry: EncoderGeometry,
    log_mel: LogMel,
    codec: CodecConfig,
    acoustic_delay: int,
    pad_id: int,
    tensor_parallel: int = 1,
    longest_clip: int | None = None,
    distort: Distort | None = None,
) -> Batch:
    """Lays the samples of each row side by side; rows may be empty.

    Args:
        longest_clip: encoder frames of the largest slot of any clip (``Demands.longest_clip``); where clips are dealt to
            tensor-parallel ranks, an encoder row has room for an even share and one such clip. None: a whole row's.
        distort: augmentation of the log-mel.

    Raises:
        InputError: ``shape`` does not suit the geometry, or the samples of a row need more than it has.
        WorkError: an array is not as long as its sample says.
    """
    if shape.encoder % geometry.stack or shape.supervised % 128:
        raise InputError(
            f"row.encoder={shape.encoder} must be a multiple of the projector's stride {geometry.stack}, "
            f"row.supervised={shape.supervised} a multiple of 128"
        )
    B = len(rows)
    text = _Text(B, shape, pad_id)
    speech = _Speech(B, shape, codec, acoustic_delay)
    clips: list[_Clip] = []
    for row, samples in enumerate(rows):
        position = 0
        for segment, (sample, rendered, arrays) in enumerate(samples):
            need = demand(sample, rendered, geometry, acoustic_delay)
            _require_room(sample, need, shape, position, speech.spoken_end[row], speech.codec_end[row], text.supervised_end[row])
            text.add(row, segment, position, rendered)
            for span in rendered.audio:
                wave = arrays.audio[span.name]
                _require_length(sample, span.name, wave.shape, (sample.num_samples[span.name],))
                mel = log_mel(wave)
                clips.append(_Clip(row, position + span.start, len(wave), distort(row, sample, span.name, mel) if distort else mel))
            for speech_span in rendered.speech:
                codes_KT = arrays.codes[speech_span.name]
                _require_length(sample, speech_span.name, codes_KT.shape, (codec.num_codebooks, sample.num_frames[speech_span.name]))
                speech.add(row, position, speech_span, codes_KT)
            position += len(rendered.token_ids)
    dealt = tensor_parallel if B % tensor_parallel else 1
    frames = shape.encoder
    if dealt > 1:
        share = -(-shape.encoder // (dealt * geometry.stack)) * geometry.stack
        frames = min(frames, share + (shape.encoder if longest_clip is None else longest_clip))
    audio = _Audio(B, dealt, frames, shape.seq, geometry, log_mel.config.num_mel_bins)
    for clip in sorted(clips, key=lambda clip: -geometry.slot(clip.samples)):
        audio.add(clip)

    tensor = torch.from_numpy
    return Batch(
        tokens_BT=tensor(text.tokens),
        segments_BT=tensor(text.segments),
        positions_BT=tensor(text.positions),
        audio_source_BT=tensor(audio.source),
        supervised_BU=tensor(text.supervised),
        targets_BU=tensor(text.targets),
        mel_RAM=tensor(audio.mel),
        mel_valid_RA=tensor(audio.valid),
        clip_segments_RA=tensor(audio.segments),
        clip_positions_RA=tensor(audio.positions),
        spoken_BS=tensor(speech.spoken),
        spoken_segments_BS=tensor(speech.spoken_segments),
        spoken_positions_BS=tensor(speech.spoken_positions),
        prefix_BF=tensor(speech.prefix),
        codes_BKF=tensor(speech.codes),
        codec_segments_BF=tensor(speech.segments),
        codec_positions_BF=tensor(speech.positions),
        codec_targets_BKF=tensor(speech.targets),
    )


class _Text:
    """Tokens, where they belong, and the positions whose hidden states predict a target."""

    def __init__(self, B: int, shape: RowShape, pad_id: int) -> None:
        self.tokens = np.full((B, shape.seq), pad_id, np.int64)
        self.segments = np.full((B, shape.seq), -1, np.int32)
        self.positions = np.zeros((B, shape.seq), np.int64)
        self.supervised = np.zeros((B, shape.supervised), np.int64)
        self.targets = np.full((B, shape.supervised), IGNORE, np.int64)
        self.supervised_end = [0] * B

    def add(self, row: int, segment: int, start: int, rendered: Rendered) -> None:
        place = slice(start, start + len(rendered.token_ids))
        self.tokens[row, place] = rendered.token_ids
        self.segments[row, place] = segment
        self.positions[row, place] = np.arange(len(rendered.token_ids))
        target_positions = np.flatnonzero(rendered.loss_mask)
        place = slice(self.supervised_end[row], self.supervised_end[row] + len(target_positions))
        self.supervised[row, place] = start + target_positions - 1
        self.targets[row, place] = rendered.token_ids[target_positions]
        self.supervised_end[row] = place.stop


class _Speech:
    """Spoken text for the Pre-NN, and the codec decoder's segments: prefix, then frames."""

    def __init__(self, B: int, shape: RowShape, codec: CodecConfig, acoustic_delay: int) -> None:
        self.card, self.acoustic_delay = codec.card, acoustic_delay
        self.spoken = np.zeros((B, shape.spoken), np.int64)
        self.spoken_segments = np.full((B, shape.spoken), -1, np.int32)
        self.spoken_positions = np.zeros((B, shape.spoken), np.int64)
        self.prefix = np.full((B, shape.codec), -1, np.int64)
        self.codes = np.full((B, codec.num_codebooks, shape.codec), NO_CODE, np.int64)
        self.segments = np.full((B, shape.codec), -1, np.int32)
        self.positions = np.zeros((B, shape.codec), np.int64)
        self.targets = np.full((B, codec.num_codebooks, shape.codec), IGNORE, np.int64)
        self.spoken_end, self.codec_end, self.spans = [0] * B, [0] * B, [0] * B

    def add(self, row: int, sample_start: int, span: SpeechSpan, codes_KT: np.ndarray) -> None:
        T = codes_KT.shape[1]
        read = sample_start + np.arange(span.start, span.stop) if span.start < span.stop else np.array([-1])
        P, spoken, start = len(read), self.spoken_end[row], self.codec_end[row]
        self.spoken[row, spoken : spoken + P] = read
        self.spoken_segments[row, spoken : spoken + P] = self.spans[row]
        self.spoken_positions[row, spoken : spoken + P] = np.arange(P)

        steps_KS = delay_codes(codes_KT, self.acoustic_delay)
        targets_KS = np.where(steps_KS == NO_CODE, IGNORE, steps_KS)
        targets_KS[0, T] = self.card
        frames = start + P
        stop = frames + steps_KS.shape[1] - 1  # the last step is predicted but never read
        self.prefix[row, start:frames] = np.arange(spoken, spoken + P)
        self.codes[row, :, frames:stop] = steps_KS[:, :-1]
        self.targets[row, :, frames - 1 : stop] = targets_KS
        self.segments[row, start:stop] = self.spans[row]
        self.positions[row, start:stop] = np.arange(stop - start)
        self.spoken_end[row], self.codec_end[row] = spoken + P, stop
        self.spans[row] += 1


@dataclass(frozen=True)
class _Clip:
    row: int
    token: int
    """Position in the row of its first ``<audio>``."""
    samples: int
    """Of its waveform."""
    mel_AM: np.ndarray


class _Audio:
    """Encoder rows: one per row, or ``dealt`` per row, those of one tensor-parallel rank side by side.

    Clips come largest first and go to the emptiest of their row's encoder rows, so no encoder row takes more than an
    even share and one clip.
    """

    def __init__(self, B: int, dealt: int, frames: int, seq: int, geometry: EncoderGeometry, mel_bins: int) -> None:
        self.B, self.dealt, self.frames, self.geometry = B, dealt, frames, geometry
        R, mel_frames = B * dealt, frames * geometry.conv_stride
        self.mel = np.zeros((R, mel_frames, mel_bins), np.float32)
        self.valid = np.zeros((R, mel_frames), bool)
        self.segments = np.full((R, frames), -1, np.int32)
        self.positions = np.zeros((R, frames), np.int64)
        self.source = np.zeros((B, seq), np.int64)
        self.end, self.clips = [0] * R, [0] * R

    def add(self, clip: _Clip) -> None:
        row = min(range(clip.row, len(self.end), self.B), key=self.end.__getitem__)
        start, size, geometry = self.end[row], clip.samples, self.geometry
        slot = geometry.slot(size)
        if start + slot > self.frames:
            raise InputError(
                f"row.encoder: a clip of {slot} frames does not fit beside {start} others into an encoder row of {self.frames}"
            )
        mel = slice(start * geometry.conv_stride, start * geometry.conv_stride + geometry.mel_frames(size))
        self.mel[row, mel] = clip.mel_AM
        self.valid[row, mel] = True
        frames = geometry.encoder_frames(size)
        self.segments[row, start : start + frames] = self.clips[row]
        self.positions[row, start : start + frames] = np.arange(frames)
        embeddings = geometry.num_audio_embeddings(size)
        first = (row * self.frames + start) // geometry.stack
        self.source[clip.row, clip.token : clip.token + embeddings] = 1 + first + np.arange(embeddings)
        self.end[row] += slot
        self.clips[row] += 1


def _require_room(sample: Sample, need: Demand, shape: RowShape, seq: int, spoken: int, codec: int, supervised: int) -> None:
    """The encoder's room is checked clip by clip."""
    for resource, used, wanted, limit in (
        ("seq", seq, need.seq, shape.seq),
        ("spoken", spoken, need.spoken, shape.spoken),
        ("codec", codec, need.codec, shape.codec),
        ("supervised", supervised, need.supervised, shape.supervised),
    ):
        if used + wanted > limit:
            raise InputError(f"sample {sample.id} needs {wanted} of row.{resource}={limit}, of which {used} are taken")


def _require_length(sample: Sample, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise WorkError(f"sample {sample.id}: {name} has shape {list(got)}, its record says {list(expected)}; verify the shards")
