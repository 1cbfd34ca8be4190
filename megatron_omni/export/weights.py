"""Names: which rows of which of our tensors each tensor of the Hugging Face format is.

Ours are fused where transformers has several: q|k|v and gate|up. Everything outside the LLM has one name on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_omni.config.model import LlmConfig


@dataclass(frozen=True)
class Rows:
    """Rows ``[start, stop)`` of the logical tensor ``name``; ``stop`` None: to its end."""

    name: str
    start: int = 0
    stop: int | None = None

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The rows as a tensor of their own."""
        return whole[self.start : self.stop].clone() if whole.dim() else whole.clone()


def llama_weights(llm: LlmConfig) -> dict[str, Rows]:
    """Every tensor of ``LlamaForCausalLM``, in the order of its layers."""
    stack = llm.stack
    kinds = ("weight", "bias") if stack.bias else ("weight",)
    wide, narrow, inner = stack.num_heads * stack.width_of_head, stack.kv_heads * stack.width_of_head, stack.intermediate_size
    weights = {"model.embed_tokens.weight": Rows("llm.embedding.weight")}
    for layer in range(stack.num_layers):
        theirs, ours = f"model.layers.{layer}", f"llm.stack.layers.{layer}"
        weights[f"{theirs}.input_layernorm.weight"] = Rows(f"{ours}.attention_norm.weight")
        weights[f"{theirs}.post_attention_layernorm.weight"] = Rows(f"{ours}.mlp_norm.weight")
        for kind in kinds:
            qkv, up = f"{ours}.attention.qkv.{kind}", f"{ours}.mlp.up.{kind}"
            weights[f"{theirs}.self_attn.q_proj.{kind}"] = Rows(qkv, 0, wide)
            weights[f"{theirs}.self_attn.k_proj.{kind}"] = Rows(qkv, wide, wide + narrow)
            weights[f"{theirs}.self_attn.v_proj.{kind}"] = Rows(qkv, wide + narrow, wide + 2 * narrow)
            weights[f"{theirs}.self_attn.o_proj.{kind}"] = Rows(f"{ours}.attention.output.{kind}")
            weights[f"{theirs}.mlp.gate_proj.{kind}"] = Rows(up, 0, inner)
            weights[f"{theirs}.mlp.up_proj.{kind}"] = Rows(up, inner, 2 * inner)
            weights[f"{theirs}.mlp.down_proj.{kind}"] = Rows(f"{ours}.mlp.down.{kind}")
    weights["model.norm.weight"] = Rows("llm.stack.norm.weight")
    if not llm.tie_embeddings:
        weights["lm_head.weight"] = Rows("llm.head.weight")
    return weights


def omni_weights(llm: LlmConfig, names: Iterable[str]) -> dict[str, Rows]:
    """Every tensor of ``OmniForConditionalGeneration`` but the codec's; ``names`` are ours."""
    own = {name: Rows(name) for name in names if not name.startswith("llm.")}
    return own | {f"llm.{name}": rows for name, rows in llama_weights(llm).items()}


def logical_tensors(weights: Mapping[str, Rows], read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The way back: our tensors ``(name, whole)`` from those of the Hugging Face format, which ``read`` gives by name."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for theirs, rows in weights.items():
        parts.setdefault(rows.name, []).append((rows.start, theirs))
    for ours, pieces in parts.items():
        tensors = [read(theirs) for _, theirs in sorted(pieces)]
        yield ours, tensors[0] if len(tensors) == 1 else torch.cat(tensors)
