"""Speech out: Pre-NN, codec decoder (codebook 0, autoregressive over frames), Depformer (codebooks 1.. of a frame).

The decoder's row of a speech segment: P prefix positions (what the Pre-NN made of the spoken text's hidden states),
then the frames. Position P - 1 + s predicts step s; the input at P + s is step s's delayed codes. The Depformer
(arXiv:2410.00037, section 3.4.2) predicts codebook k of a step from the decoder's state and codebooks 0..k-1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_omni.config.model import AudioHeadConfig, CodecConfig
from megatron_omni.kernels.attention import Segments
from megatron_omni.kernels.codec_head import codec_head
from megatron_omni.kernels.losses import LossOptions
from megatron_omni.model.positions import take
from megatron_omni.model.transformer import KeyValueCache, Transformer
from megatron_omni.parallel.collectives import split_rows
from megatron_omni.parallel.layers import Linear, new_parameter, split_by_rows
from megatron_omni.parallel.layout import TensorLayout
from megatron_omni.parallel.topology import TensorParallel
from megatron_omni.schema import Batch


class CodebookEmbedding(nn.Module):
    """One table per codebook; codes of -1 give zero. ``weight [K, entries, D]``."""

    def __init__(self, num_codebooks: int, entries: int, width: int) -> None:
        super().__init__()
        self.weight = new_parameter(TensorLayout((num_codebooks, entries, width)))

    def forward(self, codes_NK: torch.Tensor) -> torch.Tensor:
        """int64 ``[N, K] -> [N, K, D]``."""
        K, entries, width = self.weight.shape
        flat = codes_NK.clamp(min=0) + torch.arange(K, device=codes_NK.device) * entries
        return F.embedding(flat, self.weight.view(K * entries, width)) * (codes_NK >= 0).unsqueeze(-1)


class CodecHead(nn.Module):
    """Output weights of ``num_codebooks`` codebooks, applied by the fused kernel. ``weight [K, V, H]``."""

    def __init__(self, num_codebooks: int, entries: int, width: int) -> None:
        super().__init__()
        self.weight = new_parameter(TensorLayout((num_codebooks, entries, width)))

    def forward(
        self, hidden: torch.Tensor, targets_NK: torch.Tensor, scale_K: torch.Tensor, options: LossOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(scaled loss, plain sums [K], correct [K]); see ``kernels/codec_head``."""
        result = codec_head(hidden, self.weight, targets_NK, scale_K, options=options)
        return result.loss, result.sum_J, result.correct_J

    def logits(self, hidden_NH: torch.Tensor, codebook: int) -> torch.Tensor:
        """float32 ``[N, V]`` of one codebook, for decoding."""
        return (hidden_NH @ self.weight[codebook].T).float()


class PreNN(nn.Module):
    """Bidirectional stack over the LLM's hidden states of the spoken text; a learned vector stands in where there is no text."""

    def __init__(self, config: AudioHeadConfig, llm_width: int, tp: TensorParallel) -> None:
        super().__init__()
        width = config.pre_nn.hidden_size
        self.input = Linear(llm_width, width)
        self.no_text = new_parameter(TensorLayout((width,)))
        self.stack = Transformer(config.pre_nn, tp)
        self.output = Linear(width, config.decoder.hidden_size)

    def forward(
        self, hidden_BSD: torch.Tensor, learned_BS: torch.Tensor, positions_BS: torch.Tensor, segments: Segments | None
    ) -> torch.Tensor:
        """``[B, S, D_llm] -> [B, S, D_decoder]``; ``learned_BS`` True where the learned vector replaces the hidden state."""
        x_BSD = torch.where(learned_BS.unsqueeze(-1), self.no_text, self.input(hidden_BSD))
        return self.output(self.stack(x_BSD, positions_BS, segments))


class CodecDecoder(nn.Module):
    """Causal stack over prefix and frames."""

    def __init__(self, config: AudioHeadConfig, codec: CodecConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.codes = CodebookEmbedding(codec.num_codebooks, codec.card, config.decoder.hidden_size)
        self.stack = Transformer(config.decoder, tp)

    def embed(self, codes_NK: torch.Tensor) -> torch.Tensor:
        """Delayed codes of a step ``[N, K]`` -> input ``[N, D]``: the sum over codebooks."""
        return self.codes(codes_NK).sum(1)

    def forward(
        self,
        prefix_BFD: torch.Tensor,
        codes_BKF: torch.Tensor,
        positions_BF: torch.Tensor,
        segments: Segments | None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """``prefix_BFD`` is zero on frame positions, ``codes_BKF`` -1 on prefix positions."""
        B, K, frames = codes_BKF.shape
        codes_NK = codes_BKF.transpose(1, 2).reshape(B * frames, K)
        return self.stack(prefix_BFD + self.embed(codes_NK).view(B, frames, -1), positions_BF, segments, cache)


class Depformer(nn.Module):
    """Over the codebook axis: position k - 1 predicts codebook k from the decoder's state and codes 0..k-1 of the step."""

    def __init__(self, config: AudioHeadConfig, codec: CodecConfig) -> None:
        super().__init__()
        width, acoustic = config.depformer.hidden_size, codec.num_codebooks - 1
        # each codebook reads the decoder's state through its own projection, which also tells the stack which one it is
        self.input = new_parameter(TensorLayout((acoustic, width, config.decoder.hidden_size)))
        # entry `card` of codebook 0 is end of speech: with an acoustic delay codebooks 1.. go on after it
        self.codes = CodebookEmbedding(acoustic, codec.card + 1, width)
        self.stack = Transformer(config.depformer, TensorParallel.single())

    def forward(self, state_ND: torch.Tensor, previous_NK: torch.Tensor) -> torch.Tensor:
        """``state [N, D]``, codes of codebooks 0..k-1 ``[N, k]`` (-1: none) -> hidden states ``[N, k, H]`` for codebooks 1..k."""
        count = previous_NK.shape[1]
        padded_NK = F.pad(previous_NK, (0, self.input.shape[0] - count), value=-1)
        x_NKH = torch.einsum("nd,khd->nkh", state_ND, self.input) + self.codes(padded_NK)
        x_NKH = x_NKH[:, :count]
        positions_NK = torch.arange(count, device=state_ND.device).expand(x_NKH.shape[0], -1)
        hidden: torch.Tensor = self.stack(x_NKH, positions_NK)
        return hidden


class AudioHead(nn.Module):
    """Joins the three. Inside a tensor-parallel group the Depformer and both codec heads are split over steps."""

    def __init__(self, config: AudioHeadConfig, codec: CodecConfig, llm_width: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.pre_nn = PreNN(config, llm_width, tp)
        self.decoder = CodecDecoder(config, codec, tp)
        self.depformer = Depformer(config, codec)
        self.semantic_head = CodecHead(1, codec.card + 1, config.decoder.hidden_size)
        self.acoustic_head = CodecHead(codec.num_codebooks - 1, codec.card, config.depformer.hidden_size)
        for part in (self.depformer, self.semantic_head, self.acoustic_head):
            split_by_rows(part)

    def forward(
        self, hidden_BTD: torch.Tensor, batch: Batch, scale_K: torch.Tensor, options: LossOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(scaled loss, plain sums [K], correct [K]) of this tensor-parallel rank's share of the steps."""
        spoken_BSD = take(hidden_BTD, batch.spoken_BS)
        text_BSD = self.pre_nn(spoken_BSD, batch.spoken_BS < 0, batch.spoken_positions_BS, Segments(batch.spoken_segments_BS))
        prefix_BFD = take(text_BSD, batch.prefix_BF) * (batch.prefix_BF >= 0).unsqueeze(-1)
        state_BFD = self.decoder(prefix_BFD, batch.codes_BKF, batch.codec_positions_BF, Segments(batch.codec_segments_BF))

        state_ND = split_rows(state_BFD.flatten(0, 1), self.tp)
        targets_NK = batch.codec_targets_BKF.transpose(1, 2).flatten(0, 1).chunk(self.tp.size)[self.tp.rank]
        loss_0, sum_0, correct_0 = self.semantic_head(state_ND, targets_NK[:, :1], scale_K[:1], options)
        hidden_NKH = self.depformer(state_ND, targets_NK[:, :-1].clamp(min=-1))
        loss_1, sum_1, correct_1 = self.acoustic_head(hidden_NKH, targets_NK[:, 1:].contiguous(), scale_K[1:], options)
        return loss_0 + loss_1, torch.cat([sum_0, sum_1]), torch.cat([correct_0, correct_1])
