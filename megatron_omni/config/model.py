"""The shape of an omni model: what ``config.json`` of an exported model and the ``model:`` part of a recipe hold."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Unknown keys are errors; values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TransformerConfig(Strict):
    """One stack of transformer blocks; every part of the model is built from it."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = Field(None, description="key/value heads (GQA); null: as many as heads")
    head_dim: int | None = Field(None, description="width of a head; null: hidden_size / num_heads")
    intermediate_size: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rope", "sinusoidal", "none"] = "rope"
    rope_theta: float = 10000.0
    max_positions: int = 4096
    causal: bool = True
    bias: bool = Field(False, description="biases in attention and MLP (Whisper: keys have none)")
    dropout: float = Field(0.0, ge=0, lt=1, description="on each residual branch, in training")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}")
        return self


class FeatureConfig(Strict):
    """Log-mel features of the encoder (Whisper's arithmetic)."""

    sample_rate: int = Field(16000, description="Hz")
    n_fft: int = Field(400, description="samples of a window")
    hop_length: int = Field(160, description="samples between frames")
    num_mel_bins: int = 80
    normalize: Literal["whisper", "clip"] = Field(
        "whisper", description="whisper: log10, floor 8 below the maximum, (x + 4) / 4; clip: then mean 0 and deviation 1"
    )


class EncoderConfig(Strict):
    """Whisper family: convolutions over mel frames, then a bidirectional stack."""

    conv_strides: tuple[int, ...] = Field((1, 2), description="one convolution of width 3 per entry; (1, 2) is Whisper's")
    stack: TransformerConfig


class ProjectorConfig(Strict):
    stride: int = Field(4, description="encoder frames that make one embedding")
    hidden_size: int


class LlmConfig(Strict):
    family: Literal["llama"] = "llama"
    vocab_size: int = Field(0, description="rows of the embedding, padded; 0: taken from the tokenizer")
    tie_embeddings: bool = False
    stack: TransformerConfig


class CodecConfig(Strict):
    """What the model must know of the codec; taken from the data set's provenance, never from constants."""

    num_codebooks: int
    card: int
    frame_rate: float = Field(description="frames per second")
    sample_rate: int = Field(description="Hz")
    weights_hash: str = ""


class AudioHeadConfig(Strict):
    """Speech out: Pre-NN over the answer's hidden states, codec decoder for codebook 0, Depformer for the others."""

    pre_nn: TransformerConfig
    decoder: TransformerConfig
    depformer: TransformerConfig
    acoustic_delay: int = Field(0, ge=0, description="frames by which codebooks 1.. lag codebook 0")


class ModelConfig(Strict):
    features: FeatureConfig = FeatureConfig()
    encoder: EncoderConfig
    projector: ProjectorConfig
    llm: LlmConfig
    audio_head: AudioHeadConfig
    codec: CodecConfig | None = Field(None, description="null: taken from the data set")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.encoder.stack.causal or self.audio_head.pre_nn.causal:
            raise ValueError("encoder.stack and audio_head.pre_nn are bidirectional: set causal: false")
        if not (self.llm.stack.causal and self.audio_head.decoder.causal and self.audio_head.depformer.causal):
            raise ValueError("llm.stack, audio_head.decoder and audio_head.depformer are causal: set causal: true")
        return self
