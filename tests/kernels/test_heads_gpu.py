"""The fused heads on a CUDA device, in the dtype of training, against float64."""

import pytest
import torch

from megatron_omni.kernels.codec_head import codec_head
from megatron_omni.kernels.codec_head.reference import codec_head_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_codec_head_on_cuda(shared, dtype, tolerance):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    N, K, V, H = 513, 8, 2048, 256
    hidden = torch.randn((N, H) if shared else (N, K, H), device="cuda").to(dtype)
    weight = (torch.randn(K, V, H, device="cuda") / H**0.5).to(dtype)
    targets = torch.randint(0, V, (N, K), device="cuda")
    scale = torch.ones(K, device="cuda") / N

    def run(function, dtype):
        h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        result = function(h, w, targets, scale.to(torch.float64 if dtype == torch.float64 else torch.float32))
        result.loss.backward()
        return result.loss.detach(), h.grad, w.grad

    for ours, expected in zip(run(codec_head, dtype), run(codec_head_reference, torch.float64), strict=True):
        assert float((ours.double() - expected).norm() / expected.norm()) < tolerance
