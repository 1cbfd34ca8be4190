"""Our LLM computes what ``transformers.LlamaForCausalLM`` computes, on one rank and tensor parallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from megatron_omni.config.model import LlmConfig, TransformerConfig
from megatron_omni.export.configuration import llama_config
from megatron_omni.export.weights import llama_weights, logical_tensors
from megatron_omni.kernels.attention import Segments
from megatron_omni.model.omni import Llm
from megatron_omni.parallel.layers import layout_of
from megatron_omni.parallel.topology import ParallelGroups, TensorParallel, Topology
from tests.harness import run_ranks

# GQA, heads wider than hidden_size / heads, a base of RoPE that is not the default
LLM = LlmConfig(
    vocab_size=256,
    stack=TransformerConfig(
        hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=24, intermediate_size=160, rope_theta=5e5, norm_eps=1e-6
    ),
)


def stock_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    model = LlamaForCausalLM(llama_config(LLM, pad_id=0, eos_id=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than transformers' own, so that logits are of the size of trained ones
            parameter.copy_(torch.randn(parameter.shape) / 8 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def our_outputs(tp: TensorParallel) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [B, T, D] and this rank's columns of the logits, weights taken from the stock model's."""
    tensors = stock_model().state_dict()
    model = Llm(LLM, tp).eval()
    with torch.no_grad():
        parameters = {f"llm.{name}": parameter for name, parameter in model.named_parameters()}
        for name, whole in logical_tensors(llama_weights(LLM), lambda name: tensors[name]):
            parameters[name].copy_(layout_of(parameters[name]).cut(whole))
        ids_BT = token_ids()
        positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        hidden_BTD = model.stack(model.embedding(ids_BT), positions_BT, Segments(torch.zeros_like(ids_BT, dtype=torch.int32)))
        return hidden_BTD, hidden_BTD @ model.head.weight.T


def token_ids() -> torch.Tensor:
    return torch.randint(0, LLM.vocab_size, (2, 33), generator=torch.Generator().manual_seed(4))


def on_rank(tensor: int) -> tuple[list[list[list[float]]], list[list[list[float]]]]:
    groups = ParallelGroups(Topology(dist.get_world_size(), tensor, dist.get_rank()))
    hidden, logits = our_outputs(groups.tensor_parallel)
    return hidden.tolist(), logits.tolist()


@pytest.mark.parametrize("tensor", [1, 2])
def test_llama(tensor: int) -> None:
    if tensor == 1:
        hidden, logits = our_outputs(TensorParallel.single())
    else:
        ranks = run_ranks(on_rank, tensor, tensor)
        hidden, logits = torch.tensor(ranks[0][0]), torch.cat([torch.tensor(columns) for _, columns in ranks], -1)
    with torch.no_grad():
        expected = stock_model()(token_ids(), output_hidden_states=True)
    assert float(expected.logits.abs().max()) > 1
    torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
