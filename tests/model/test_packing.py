"""A sample never sees another: packed rows give the loss and the gradients of one sample per row."""

import numpy as np
import pytest
import torch

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.render import render
from megatron_omni.data.rows.collate import Packed
from megatron_omni.data.tasks import prompt_for
from megatron_omni.model.init import initial_value
from megatron_omni.model.omni import OmniModel
from megatron_omni.parallel.layers import layout_of
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import TASKS, Counts, LossScale, Message, Part, Sample, SampleArrays, Task
from tests.factories import CODEC, WORDS, model_config, pack, packed, tokenizer


def build(config) -> OmniModel:
    model = OmniModel(config, TensorParallel.single())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, layout_of(parameter), config, seed=0))
    return model


def gradients(model, batch, scale):
    model.zero_grad()
    losses = model(batch, scale)
    losses.loss.backward()
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def conversation(number: int, task: Task, turns: int = 1, audios: int = 1) -> Packed:
    """One sample as the data give it: ``turns`` exchanges of the task's format, each over ``audios`` clips."""
    random = rng("conversation", task, turns, audios, number)
    audio, codes, messages = {}, {}, []
    for turn in range(turns):
        heard = [f"audio{turn * audios + clip}" for clip in range(audios)]
        audio |= {name: 0.1 * random.standard_normal(int(random.integers(1600, 4800))).astype(np.float32) for name in heard}
        prompt = prompt_for(task)
        question = [Part("audio", name) for name in heard] + ([Part("text", prompt)] if prompt else [])
        answer = [Part("text", " ".join(random.choice(WORDS, random.integers(1, 4))))]
        if task == "speech_to_speech":
            answer.append(Part("codes", f"codes{turn}"))
            codes[f"codes{turn}"] = random.integers(0, CODEC.card, (CODEC.num_codebooks, random.integers(1, 5))).astype(np.uint16)
        messages += [Message("user", tuple(question)), Message("assistant", tuple(answer))]
    lengths, frames = {name: len(wave) for name, wave in audio.items()}, {name: array.shape[1] for name, array in codes.items()}
    sample = Sample(f"{task}-{number}", task, "", tuple(messages), lengths, frames)
    return sample, render(sample, tokenizer(), EncoderGeometry.of(model_config())), SampleArrays(audio, codes)


def difference(ours, reference) -> float:
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-8))


def require_equal(samples, config, per_row=3):
    """Loss and gradients of several samples per row are those of one sample per row."""
    model = build(config)
    together = pack([samples[start : start + per_row] for start in range(0, len(samples), per_row)], config)
    apart = pack([[sample] for sample in samples], config)
    counts = Counts.of(together)
    assert counts == Counts.of(apart)
    scale = LossScale.of(counts, 1.0, (0.5,) * len(counts.codec), replicas=1)
    loss, grads = gradients(model, together, scale)
    expected, expected_grads = gradients(model, apart, scale)
    assert difference(loss.loss.detach(), expected.loss.detach()) < 1e-5
    torch.testing.assert_close(loss.codec_sum_K, expected.codec_sum_K, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert difference(grad, expected_grads[name]) < 1e-5, name


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_packed_equals_one_sample_per_row(delay):
    config = model_config(delay)
    require_equal(packed(range(9), config), config)


@pytest.mark.parametrize(("turns", "audios"), [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("task", TASKS)
def test_packed_equals_unpacked_in_every_format(task, turns, audios):
    require_equal([conversation(number, task, turns, audios) for number in range(4)], model_config(), per_row=2)


def test_packed_equals_unpacked_with_all_formats_in_a_row():
    require_equal([conversation(number, task) for number, task in enumerate(TASKS)], model_config())


@pytest.mark.parametrize("leak", ["segments_BT", "clip_segments_RA", "spoken_segments_BS", "codec_segments_BF"])
def test_a_planted_leak_between_samples_is_seen(leak):
    """The comparison above would notice if attention crossed a boundary in any of the four stacks."""
    config = model_config()
    model = build(config)
    batch = pack([packed(range(3), config, speech=True)], config)
    scale = LossScale.of(Counts.of(batch), 1.0, (0.5,) * 4, replicas=1)
    segments = getattr(batch, leak)
    leaking = type(batch)(**{**vars(batch), leak: segments.clamp(max=0)})
    assert abs(model(leaking, scale).loss - model(batch, scale).loss) > 1e-4


def test_padding_changes_nothing():
    """What padding holds (tokens, codes, positions beyond the samples) has no influence."""
    config = model_config()
    model = build(config)
    batch = pack([packed(range(2), config)], config)
    scale = LossScale.of(Counts.of(batch), 1.0, (0.5,) * 4, replicas=1)
    tokens = batch.tokens_BT.where(batch.segments_BT >= 0, 5)
    other = type(batch)(**{**vars(batch), "tokens_BT": tokens, "mel_RAM": batch.mel_RAM + ~batch.mel_valid_RA.unsqueeze(-1) * 0.0})
    assert torch.equal(model(other, scale).loss, model(batch, scale).loss)


def test_every_parameter_gets_a_gradient_from_any_row():
    """Rows without audio, codes or targets still run every branch; ZeRO-3 would hang otherwise."""
    config = model_config()
    model = build(config)
    batch = pack([[]], config)
    losses = model(batch, LossScale.of(Counts.of(batch), 1.0, (0.5,) * 4, replicas=1))
    losses.loss.backward()
    assert losses.loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


def test_bfloat16_follows_float32():
    """Every operation keeps to the weights' dtype; the losses are those of float32 up to bfloat16's rounding."""
    config = model_config(acoustic_delay=1)
    model = build(config)
    batch = pack([packed(range(3), config)], config)
    scale = LossScale.of(Counts.of(batch), 1.0, (0.5,) * 4, replicas=1)
    expected = model(batch, scale).loss.item()
    losses = model.bfloat16()(batch, scale)
    losses.loss.backward()
    assert losses.loss.item() == pytest.approx(expected, rel=2e-2)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}
