"""Packed rows as tensors: every index that the model needs is built here, on the CPU, in static shapes (``schema.Batch``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_omni.audio.delay import NO_CODE, delay_codes
from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.render import demand
from megatron_omni.data.rows.layout import BatchLayout
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
    memory: memoryview | None = None,
) -> Batch:
    """Lays the samples of each row side by side; rows may be empty.

    Args:
        longest_clip: encoder frames of the largest slot of any clip (``Demands.longest_clip``); where clips are dealt to
            tensor-parallel ranks, an encoder row has room for an even share and one such clip. None: a whole row's.
        distort: augmentation of the log-mel.
        memory: where to lay them, ``BatchLayout.num_bytes`` bytes; None: anywhere.

    Raises:
        InputError: ``shape`` does not suit the geometry, or the samples of a row need more than it has.
        WorkError: an array is not as long as its sample says.
    """
    layout = BatchLayout.of(len(rows), shape, geometry, log_mel.config.num_mel_bins, codec, pad_id, tensor_parallel, longest_clip)
    batch = layout.blank(memory)
    text, speech, audio = _Text(batch), _Speech(batch, codec, acoustic_delay), _Audio(batch, geometry)
    clips: list[_Clip] = []
    for row, samples in enumerate(rows):
        position = 0
        for segment, (sample, rendered, arrays) in enumerate(samples):
            require_lengths(sample, rendered, arrays, codec)
            need = demand(sample, rendered, geometry, acoustic_delay)
            _require_room(sample, need, shape, position, speech.spoken_end[row], speech.codec_end[row], text.supervised_end[row])
            text.add(row, segment, position, rendered)
            for span in rendered.audio:
                wave = arrays.audio[span.name]
                mel = log_mel(wave)
                clips.append(_Clip(row, position + span.start, len(wave), distort(row, sample, span.name, mel) if distort else mel))
            for speech_span in rendered.speech:
                speech.add(row, position, speech_span, arrays.codes[speech_span.name])
            position += len(rendered.token_ids)
    for clip in sorted(clips, key=lambda clip: -geometry.slot(clip.samples)):
        audio.add(clip)
    return batch


def require_lengths(sample: Sample, rendered: Rendered, arrays: SampleArrays, codec: CodecConfig) -> None:
    """``WorkError`` where an array that the row needs is not as long as the sample says."""
    for span in rendered.audio:
        _require_length(sample, span.name, arrays.audio[span.name].shape, (sample.num_samples[span.name],))
    for speech_span in rendered.speech:
        frames = sample.num_frames[speech_span.name]
        _require_length(sample, speech_span.name, arrays.codes[speech_span.name].shape, (codec.num_codebooks, frames))


class _Text:
    """Tokens, where they belong, and the positions whose hidden states predict a target."""

    def __init__(self, batch: Batch) -> None:
        self.tokens, self.segments, self.positions = batch.tokens_BT.numpy(), batch.segments_BT.numpy(), batch.positions_BT.numpy()
        self.supervised, self.targets = batch.supervised_BU.numpy(), batch.targets_BU.numpy()
        self.supervised_end = [0] * len(self.tokens)

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

    def __init__(self, batch: Batch, codec: CodecConfig, acoustic_delay: int) -> None:
        self.card, self.acoustic_delay = codec.card, acoustic_delay
        self.spoken, self.spoken_segments = batch.spoken_BS.numpy(), batch.spoken_segments_BS.numpy()
        self.spoken_positions, self.prefix = batch.spoken_positions_BS.numpy(), batch.prefix_BF.numpy()
        self.codes, self.targets = batch.codes_BKF.numpy(), batch.codec_targets_BKF.numpy()
        self.segments, self.positions = batch.codec_segments_BF.numpy(), batch.codec_positions_BF.numpy()
        B = len(self.spoken)
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

    def __init__(self, batch: Batch, geometry: EncoderGeometry) -> None:
        self.B, self.geometry = len(batch.tokens_BT), geometry
        self.mel, self.valid, self.source = batch.mel_RAM.numpy(), batch.mel_valid_RA.numpy(), batch.audio_source_BT.numpy()
        self.segments, self.positions = batch.clip_segments_RA.numpy(), batch.clip_positions_RA.numpy()
        R, self.frames = self.segments.shape
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
