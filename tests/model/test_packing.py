"""A sample never sees another: packed rows give the loss and the gradients of one sample per row."""

import pytest
import torch

from megatron_omni.model.init import initial_value
from megatron_omni.model.omni import OmniModel
from megatron_omni.parallel.layers import layout_of
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.schema import Counts, LossScale
from tests.factories import model_config, pack, packed


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


def difference(ours, reference) -> float:
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-8))


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_packed_equals_one_sample_per_row(delay):
    config = model_config(delay)
    model = build(config)
    samples = packed(range(9), config)
    together, apart = pack([samples[:3], samples[3:6], samples[6:]], config), pack([[s] for s in samples], config)
    counts = Counts.of(together)
    assert counts == Counts.of(apart)
    scale = LossScale.of(counts, 1.0, (0.5,) * len(counts.codec), replicas=1)
    loss, grads = gradients(model, together, scale)
    expected, expected_grads = gradients(model, apart, scale)
    assert difference(loss.loss.detach(), expected.loss.detach()) < 1e-5
    torch.testing.assert_close(loss.codec_sum_K, expected.codec_sum_K, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert difference(grad, expected_grads[name]) < 1e-5, name


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
