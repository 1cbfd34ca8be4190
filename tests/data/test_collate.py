"""A batch holds exactly its samples: each is read back from the tensors alone, in random rows and for any TP size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omni.audio.delay import undelay_codes
from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.render import render
from megatron_omni.data.rows.collate import Packed, collate
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError, WorkError
from megatron_omni.schema import IGNORE, Batch, RowShape

SHAPE = RowShape(seq=512, codec=256, encoder=1024, spoken=128, supervised=128)


def packed(memory_samples, seed: int, numbers: list[int], tokenizer: OmniTokenizer, geometry: EncoderGeometry) -> list[Packed]:
    data = memory_samples(100, seed)
    return [(sample, render(sample, tokenizer, geometry), data.arrays(number)) for number in numbers for sample in [data.sample(number)]]


def check_text(batch: Batch, b: int, segment: int, row: Packed) -> int:
    """Returns where the sample begins."""
    _, rendered, _ = row
    (places,) = (batch.segments_BT[b] == segment).nonzero(as_tuple=True)
    start, length = int(places[0]), len(rendered.token_ids)
    assert places.tolist() == list(range(start, start + length))
    assert batch.tokens_BT[b, places].tolist() == rendered.token_ids.tolist()
    assert batch.positions_BT[b, places].tolist() == list(range(length))
    real = batch.targets_BU[b] != IGNORE
    predicted = {int(p) + 1: int(t) for p, t in zip(batch.supervised_BU[b][real], batch.targets_BU[b][real], strict=True)}
    expected = {start + i: int(rendered.token_ids[i]) for i in np.flatnonzero(rendered.loss_mask)}
    assert {place: token for place, token in predicted.items() if start <= place < start + length} == expected
    return start


def check_audio(batch: Batch, b: int, start: int, row: Packed, geometry: EncoderGeometry, log_mel: LogMel, tp: int) -> None:
    sample, rendered, arrays = row
    per_row = batch.clip_segments_RA.shape[1] // geometry.stack
    rows_per_rank = batch.mel_RAM.shape[0] // tp
    spans = {start + span.start + n: (span, n) for span in rendered.audio for n in range(span.length)}
    for place in range(start, start + len(rendered.token_ids)):
        assert (int(batch.audio_source_BT[b, place]) > 0) == (place in spans)
    for span in rendered.audio:
        source = batch.audio_source_BT[b, start + span.start : start + span.start + span.length] - 1
        assert source.tolist() == list(range(int(source[0]), int(source[0]) + span.length))
        r, embedding = divmod(int(source[0]), per_row)
        if batch.mel_RAM.shape[0] == batch.tokens_BT.shape[0]:
            assert r == b
        else:
            assert r % rows_per_rank == b  # the block of r // rows_per_rank belongs to that tensor-parallel rank
        first = embedding * geometry.stack
        size = sample.num_samples[span.name]
        mel = log_mel(arrays.audio[span.name])
        at = first * geometry.conv_stride
        assert torch.equal(batch.mel_RAM[r, at : at + len(mel)], torch.from_numpy(mel))
        assert batch.mel_valid_RA[r, at : at + len(mel)].all()
        gap = batch.mel_valid_RA[r, at + len(mel) : at + len(mel) + 1]
        assert not gap.any()
        frames = geometry.encoder_frames(size)
        segments = batch.clip_segments_RA[r, first : first + frames]
        assert (segments == segments[0]).all()
        assert (batch.clip_segments_RA[r] == segments[0]).sum() == frames
        assert batch.clip_positions_RA[r, first : first + frames].tolist() == list(range(frames))


def check_speech(batch: Batch, b: int, start: int, row: Packed, first_span: int, delay: int, card: int) -> int:
    """Returns how many spans the sample has."""
    sample, rendered, arrays = row
    for number, span in enumerate(rendered.speech, first_span):
        (spoken,) = (batch.spoken_segments_BS[b] == number).nonzero(as_tuple=True)
        read = [start + i for i in range(span.start, span.stop)] or [-1]
        P, T = len(read), sample.num_frames[span.name]
        assert batch.spoken_BS[b, spoken].tolist() == read
        assert batch.spoken_positions_BS[b, spoken].tolist() == list(range(P))
        (places,) = (batch.codec_segments_BF[b] == number).nonzero(as_tuple=True)
        steps = max(T + 1, T + delay)
        assert len(places) == P + steps - 1
        assert batch.codec_positions_BF[b, places].tolist() == list(range(len(places)))
        assert batch.prefix_BF[b, places].tolist() == [*spoken.tolist(), *[-1] * (steps - 1)]
        inputs = batch.codes_BKF[b][:, places].numpy()
        targets = batch.codec_targets_BKF[b][:, places].numpy()
        assert (inputs[:, :P] == -1).all()
        assert (targets[:, : P - 1] == IGNORE).all()
        predicted = targets[:, P - 1 :]
        assert predicted.shape[1] == steps
        assert predicted[0, T] == card
        assert (predicted[0, T + 1 :] == IGNORE).all()
        assert (undelay_codes(predicted, delay) == arrays.codes[span.name]).all()
        assert (predicted != IGNORE).sum() == arrays.codes[span.name].size + 1
        # what a step predicted is what the next position reads, the end of speech excepted
        shown = np.where((predicted == IGNORE) | (predicted == card), -1, predicted)
        assert (inputs[:, P:] == shown[:, :-1]).all()
    return len(rendered.speech)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    tp=st.sampled_from([1, 2, 3]),
    delay=st.integers(0, 3),
)
def test_every_sample_is_read_back(
    seed: int, sizes: list[int], tp: int, delay: int, memory_samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, log_mel: LogMel
) -> None:
    codec = memory_samples(1).codec
    numbers = iter(range(100))
    rows = [packed(memory_samples, seed, [next(numbers) for _ in range(size)], tokenizer, geometry) for size in sizes]
    batch = collate(rows, SHAPE, geometry, log_mel, codec, delay, tokenizer.pad_id, tp)
    B = len(rows)
    assert batch.mel_RAM.shape[0] == (B if B % tp == 0 else B * tp)
    assert batch.mel_RAM.shape[1] == batch.clip_segments_RA.shape[1] * geometry.conv_stride
    for b, row in enumerate(rows):
        spans = 0
        for segment, item in enumerate(row):
            start = check_text(batch, b, segment, item)
            check_audio(batch, b, start, item, geometry, log_mel, tp)
            spans += check_speech(batch, b, start, item, spans, delay, codec.card)
        assert int(batch.segments_BT[b].max()) == len(row) - 1
        assert int(batch.codec_segments_BF[b].max()) == spans - 1
        assert int((batch.targets_BU[b] != IGNORE).sum()) == sum(int(rendered.loss_mask.sum()) for _, rendered, _ in row)
        padding = batch.segments_BT[b] < 0
        assert (batch.tokens_BT[b][padding] == tokenizer.pad_id).all()
        assert (batch.audio_source_BT[b][padding] == 0).all()
    assert not batch.mel_RAM[~batch.mel_valid_RA].any()
    clips = sum(len(rendered.audio) for row in rows for _, rendered, _ in row)
    assert sum(int(segments.max()) + 1 for segments in batch.clip_segments_RA) == clips


def test_shapes_and_types_are_those_of_the_schema(
    memory_samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, log_mel: LogMel
) -> None:
    codec = memory_samples(1).codec
    full = collate([packed(memory_samples, 0, [0, 1], tokenizer, geometry), []], SHAPE, geometry, log_mel, codec, 0, tokenizer.pad_id)
    empty = collate([[], []], SHAPE, geometry, log_mel, codec, 0, tokenizer.pad_id)
    integers = {
        "segments_BT": torch.int32,
        "clip_segments_RA": torch.int32,
        "spoken_segments_BS": torch.int32,
        "codec_segments_BF": torch.int32,
    }
    others = {"mel_RAM": torch.float32, "mel_valid_RA": torch.bool}
    for field in dataclasses.fields(Batch):
        tensor = getattr(full, field.name)
        assert tensor.dtype == {**integers, **others}.get(field.name, torch.int64), field.name
        assert tensor.shape == getattr(empty, field.name).shape, field.name
    assert full.mel_RAM.shape == (2, SHAPE.encoder * geometry.conv_stride, 8)
    assert full.codes_BKF.shape == (2, codec.num_codebooks, SHAPE.codec)


def test_dealt_clips_are_balanced(memory_samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, log_mel: LogMel) -> None:
    row = packed(memory_samples, 0, list(range(8)), tokenizer, geometry)
    slots = [geometry.slot(sample.num_samples[span.name]) for sample, rendered, _ in row for span in rendered.audio]
    shape = dataclasses.replace(SHAPE, encoder=-(-sum(slots) // 4) * 4)
    codec = memory_samples(1).codec
    batch = collate([row], shape, geometry, log_mel, codec, 0, tokenizer.pad_id, 2, longest_clip=max(slots))
    assert batch.mel_RAM.shape[0] == 2
    assert batch.clip_segments_RA.shape[1] == min(shape.encoder, -(-shape.encoder // 8) * 4 + max(slots))
    loads = (batch.clip_segments_RA >= 0).sum(1).tolist()
    assert abs(loads[0] - loads[1]) <= max(slots)


def test_refusals(memory_samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, log_mel: LogMel) -> None:
    codec = memory_samples(1).codec
    row = packed(memory_samples, 0, [0], tokenizer, geometry)

    def make(shape: RowShape = SHAPE, rows: list[list[Packed]] | None = None) -> Batch:
        return collate(rows or [row], shape, geometry, log_mel, codec, 0, tokenizer.pad_id)

    with pytest.raises(InputError, match=r"row\.encoder=1022 must be a multiple"):
        make(dataclasses.replace(SHAPE, encoder=1022))
    with pytest.raises(InputError, match=r"sample s0 needs \d+ of row\.seq=8"):
        make(dataclasses.replace(SHAPE, seq=8))
    sample, rendered, arrays = next(item for item in packed(memory_samples, 0, list(range(20)), tokenizer, geometry) if item[1].audio)
    short = dataclasses.replace(arrays, audio={name: wave[:-1] for name, wave in arrays.audio.items()})
    with pytest.raises(WorkError, match=rf"sample {sample.id}: audio0 has shape .* verify the shards"):
        make(rows=[[(sample, rendered, short)]])
