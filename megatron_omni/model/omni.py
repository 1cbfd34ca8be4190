"""The omni model: packed row -> scaled loss. Audio enters the LLM's sequence; text and speech leave it.

    mel -> encoder -> projector -+
    tokens -> embedding ---------+-> LLM -> text head        (text loss)
                                      |
                                      +-> audio head -> codec heads (codec losses)

Every row runs every branch, whatever it holds, so ranks never differ and ZeRO-3 cannot hang.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_omni.config.model import LlmConfig, ModelConfig
from megatron_omni.kernels.attention import Segments
from megatron_omni.kernels.losses import LossOptions
from megatron_omni.kernels.text_head import text_head
from megatron_omni.model.audio_head import AudioHead
from megatron_omni.model.encoder import AudioEncoder, Projector
from megatron_omni.model.positions import place_audio, take
from megatron_omni.model.transformer import Transformer
from megatron_omni.parallel.collectives import gather_rows, sum_over_ranks
from megatron_omni.parallel.layers import VocabParallelEmbedding, new_parameter, split_by_rows
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.schema import Batch, LossScale, StepLosses


class TextHead(nn.Module):
    """Vocabulary-parallel output weight ``[V / tp, D]``, applied by the fused kernel."""

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        shape = (vocab_size, width)
        self.weight = new_parameter(TensorLayout(shape) if tp.size == 1 else TensorLayout.sharded(shape, 0, [vocab_size], tp.rank, tp.size))

    def forward(
        self, hidden_UD: torch.Tensor, targets_U: torch.Tensor, scale: float, options: LossOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        result = text_head(hidden_UD, self.weight, targets_U, scale, self.tp.group, options)
        return result.loss, result.sum_J[0], result.correct_J[0]


class Llm(nn.Module):
    """Embedding, stack, text head. Input embeddings come in, since audio replaces some of them."""

    def __init__(self, config: LlmConfig, tp: TensorParallel) -> None:
        super().__init__()
        width = config.stack.hidden_size
        self.embedding = VocabParallelEmbedding(config.vocab_size, width, tp)
        self.stack = Transformer(config.stack, tp)
        self.head = TextHead(config.vocab_size, width, tp)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight


class OmniModel(nn.Module):
    """See the module's docstring. ``config.codec`` and ``config.llm.vocab_size`` must be filled in."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, options: LossOptions = LossOptions()) -> None:
        super().__init__()
        assert config.codec is not None and config.llm.vocab_size > 0, "resolve the configuration first"
        self.config = config
        self.tp = tp
        self.options = options
        llm_width = config.llm.stack.hidden_size
        self.encoder = AudioEncoder(config.encoder, config.features)
        self.projector = Projector(config.projector, config.encoder.stack.hidden_size, llm_width)
        self.llm = Llm(config.llm, tp)
        self.audio_head = AudioHead(config.audio_head, config.codec, llm_width, tp)
        for part in (self.encoder, self.projector):
            split_by_rows(part)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Token embeddings with the projected audio in the place of the ``<audio>`` positions, ``[B, T, D]``.

        Encoder rows are dealt out over the tensor-parallel group and their embeddings collected.
        """
        rows = batch.mel_RAM.shape[0] // self.tp.size
        mine = slice(self.tp.rank * rows, (self.tp.rank + 1) * rows)
        segments_RA = batch.clip_segments_RA[mine]
        mel_RAM = batch.mel_RAM[mine].to(self.llm.embedding.weight.dtype)
        frames = self.encoder(mel_RAM, batch.mel_valid_RA[mine], segments_RA, batch.clip_positions_RA[mine])
        audio_XD = gather_rows(self.projector(frames, segments_RA), self.tp).flatten(0, 1)
        return place_audio(self.llm.embedding(batch.tokens_BT), audio_XD, batch.audio_source_BT)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """The LLM's last hidden states (normed), ``[B, T, D]``."""
        hidden: torch.Tensor = self.llm.stack(self.embed(batch), batch.positions_BT, Segments(batch.segments_BT))
        return hidden

    def forward(self, batch: Batch, scale: LossScale) -> StepLosses:
        hidden_BTD = self.hidden_states(batch)
        hidden_UD = take(hidden_BTD, batch.supervised_BU).flatten(0, 1)
        text_loss, text_sum, text_correct = self.llm.head(hidden_UD, batch.targets_BU.flatten(), scale.text, self.options)
        scale_K = torch.tensor(scale.codec, dtype=torch.float32, device=hidden_BTD.device)
        codec_loss, codec_sum_K, codec_correct_K = self.audio_head(hidden_BTD, batch, scale_K, self.options)
        return StepLosses(
            loss=text_loss + sum_over_ranks(codec_loss, self.tp),
            text_sum=text_sum,
            text_correct=text_correct,
            codec_sum_K=sum_over_ranks(codec_sum_K, self.tp),
            codec_correct_K=sum_over_ranks(codec_correct_K, self.tp),
        )
