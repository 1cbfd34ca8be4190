"""Both fused heads against the plain formula in float64: losses, counts and every gradient, at odd shapes."""

import itertools

import pytest
import torch

from megatron_omni.kernels.codec_head import codec_head
from megatron_omni.kernels.codec_head.reference import codec_head_reference
from megatron_omni.kernels.losses import LossOptions
from megatron_omni.kernels.text_head import text_head
from megatron_omni.kernels.text_head.reference import text_head_reference

OPTIONS = [LossOptions(), LossOptions(label_smoothing=0.1, z_loss=1e-3)]


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference).norm() / reference.norm().clamp(min=1e-12))


@pytest.mark.parametrize(
    ("N", "K", "V", "H", "shared", "options"),
    [
        (*shape, shared, options)
        for shape, shared, options in itertools.product([(1, 8, 1000, 64), (127, 7, 257, 64), (513, 1, 2049, 32)], [True, False], OPTIONS)
    ],
)
def test_codec_head_equals_float64_reference(N, K, V, H, shared, options):
    torch.manual_seed(N)
    hidden = torch.randn((N, H) if shared else (N, K, H), dtype=torch.float64)
    weight = torch.randn(K, V, H, dtype=torch.float64) / H**0.5
    targets = torch.randint(0, V, (N, K))
    targets[torch.rand(N, K) < 0.3] = options.ignore_index
    if K > 1:
        targets[:, 1] = options.ignore_index  # a codebook without any target
    scale, frames = torch.rand(K, dtype=torch.float64), torch.rand(N, dtype=torch.float64)

    def run(function, dtype, *extra):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        result = function(h, w, targets, scale.to(dtype), frames.to(dtype), options, *extra)
        (3.0 * result.loss).backward()
        return result, h.grad, w.grad

    reference, *reference_grads = run(codec_head_reference, torch.float64)
    ours, *grads = run(codec_head, torch.float32, 4 * K * V * 50)  # chunks of 50 frames
    assert relative(ours.loss, reference.loss) < 1e-5
    assert relative(ours.sum_J, reference.sum_J) < 1e-5
    assert ours.count_J.tolist() == reference.count_J.tolist()
    assert ours.correct_J.tolist() == reference.correct_J.tolist()
    for grad, expected in zip(grads, reference_grads, strict=True):
        assert relative(grad, expected) < 1e-5


@pytest.mark.parametrize("options", OPTIONS)
def test_text_head_equals_float64_reference(options):
    torch.manual_seed(1)
    U, D, V = 130, 48, 1000
    hidden, weight = torch.randn(U, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64) / D**0.5
    targets = torch.randint(0, V, (U,))
    targets[::3] = options.ignore_index
    grads = {}
    for name, function, dtype, extra in (("r", text_head_reference, torch.float64, ()), ("o", text_head, torch.float32, (None,))):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        result = function(h, w, targets, 0.5, *extra, options=options)
        (2 * result.loss).backward()
        grads[name] = (result, h.grad, w.grad)
    reference, ours = grads["r"], grads["o"]
    assert relative(ours[0].loss, reference[0].loss) < 1e-5
    assert ours[0].correct_J.tolist() == reference[0].correct_J.tolist()
    assert relative(ours[1], reference[1]) < 1e-5
    assert relative(ours[2], reference[2]) < 1e-5


def test_all_ignored_gives_zero_loss_and_zero_gradients():
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(3, 11, 16, requires_grad=True)
    result = codec_head(hidden, weight, torch.full((5, 3), -100), torch.ones(3))
    result.loss.backward()
    assert result.loss.item() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_chunks_bound_the_logits_alive(monkeypatch):
    """No tensor larger than one chunk of logits (or a gradient) is ever made."""
    N, K, V, H = 1024, 4, 512, 8
    budget = 4 * K * V * 64
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel() * out.element_size())
            return out

    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(K, V, H, requires_grad=True)
    with Watch():
        codec_head(hidden, weight, torch.randint(0, V, (N, K)), torch.ones(K), chunk_bytes=budget).loss.backward()
    assert largest <= max(budget, 4 * K * V * H, 4 * N * H)
    assert largest < 4 * N * K * V / 8


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="does not fit weight"):
        codec_head(torch.randn(4, 8), torch.randn(2, 5, 16), torch.zeros(4, 2, dtype=torch.long), torch.ones(2))
    with pytest.raises(ValueError, match="want \\(4, 2\\) targets"):
        codec_head(torch.randn(4, 16), torch.randn(2, 5, 16), torch.zeros(4, 3, dtype=torch.long), torch.ones(2))
