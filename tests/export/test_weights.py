"""The map of names covers transformers' tensors exactly, and leads back."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_omni.config.model import LlmConfig, TransformerConfig
from megatron_omni.export.configuration import llama_config
from megatron_omni.export.weights import llama_weights, logical_tensors
from megatron_omni.model.omni import Llm
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.runtime.errors import InputError

STACK = TransformerConfig(hidden_size=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, intermediate_size=40)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_tensor_of_transformers_is_some_rows_of_ours(tied: bool, bias: bool) -> None:
    llm = LlmConfig(vocab_size=128, tie_embeddings=tied, stack=STACK.model_copy(update={"bias": bias}))
    ours = {f"llm.{name}": torch.randn(p.shape) for name, p in Llm(llm, TensorParallel.single()).named_parameters()}
    weights = llama_weights(llm)
    theirs = {name: rows.of(ours[rows.name]) for name, rows in weights.items()}
    with torch.device("meta"):
        stock = LlamaForCausalLM(llama_config(llm, pad_id=0, eos_id=1))
    assert {name: p.shape for name, p in stock.named_parameters()} == {name: tensor.shape for name, tensor in theirs.items()}
    back = dict(logical_tensors(weights, lambda name: theirs[name]))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_what_llama_does_not_compute_is_refused() -> None:
    llm = LlmConfig(vocab_size=128, stack=STACK.model_copy(update={"mlp": "gelu"}))
    with pytest.raises(InputError, match=r"llm\.stack\.mlp is 'gelu'"):
        llama_config(llm, pad_id=0, eos_id=1)
