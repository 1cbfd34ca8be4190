"""``config.json`` of an exported model: our ``ModelConfig`` beside the stock configurations of its LLM and codec."""

from __future__ import annotations

from typing import Any, cast

from transformers import LlamaConfig, MimiConfig, PreTrainedConfig

from megatron_omni.config.model import LlmConfig, ModelConfig
from megatron_omni.runtime.errors import InputError


class OmniConfig(PreTrainedConfig):
    """``omni`` is a ``ModelConfig`` as JSON; ``llm_config`` and ``codec_config`` are what transformers builds its parts from."""

    model_type = "megatron_omni"
    sub_configs = {"llm_config": LlamaConfig, "codec_config": MimiConfig}  # noqa: RUF012 - a ClassVar of the base class

    omni: dict[str, Any] | None = None
    llm_config: Any = None
    """A ``LlamaConfig``; its JSON is taken too."""
    codec_config: Any = None
    """A ``MimiConfig``; its JSON is taken too."""

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers calls the class without arguments too, to learn its defaults; then both parts are stock
        for name, kind in self.sub_configs.items():
            value = getattr(self, name)
            setattr(self, name, value if isinstance(value, PreTrainedConfig) else kind(**(value or {})))
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, model: ModelConfig, codec: MimiConfig, pad_id: int, eos_id: int) -> OmniConfig:
        """The configuration of a resolved ``model`` (its vocabulary and codec are known).

        Raises:
            InputError: an LLM that no stock class of transformers computes.
        """
        return cls(omni=model.model_dump(mode="json"), llm_config=llama_config(model.llm, pad_id, eos_id), codec_config=codec)

    @property
    def model(self) -> ModelConfig:
        """``omni`` as its own type."""
        if self.omni is None:
            raise InputError("config.json has no entry `omni`: it was not written by tools/convert_checkpoint.py to-hf")
        return ModelConfig.model_validate(self.omni)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> LlamaConfig:
        """The LLM's, where transformers looks for vocabulary and cache sizes."""
        return cast(LlamaConfig, self.llm_config)


def llama_config(llm: LlmConfig, pad_id: int, eos_id: int) -> LlamaConfig:
    """The stock Llama with the arithmetic of ``llm``; ``InputError`` if there is none."""
    stack = llm.stack
    for key, want in {"norm": "rms", "mlp": "swiglu", "positions": "rope", "causal": True}.items():
        if (got := getattr(stack, key)) != want:
            raise InputError(f"llm.stack.{key} is {got!r}: a {llm.family} model has {want!r}; train one of these to export it")
    return LlamaConfig(
        vocab_size=llm.vocab_size,
        hidden_size=stack.hidden_size,
        intermediate_size=stack.intermediate_size,
        num_hidden_layers=stack.num_layers,
        num_attention_heads=stack.num_heads,
        num_key_value_heads=stack.kv_heads,
        head_dim=stack.width_of_head,
        max_position_embeddings=stack.max_positions,
        rms_norm_eps=stack.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": stack.rope_theta},
        attention_bias=stack.bias,
        mlp_bias=stack.bias,
        tie_word_embeddings=llm.tie_embeddings,
        bos_token_id=None,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
    )
