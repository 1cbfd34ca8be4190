"""Teacher-forced losses of a data set, every sample once, in packed rows; codec losses beside the entropy of their targets.

A codec loss means something only beside the unigram entropy of the very codes it is taken over: that is what a model
reaches that knows how often each code occurs and nothing else. Both are taken over codes alone; the end of speech,
which codebook 0 also predicts, is scored apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.render import demand, render
from megatron_omni.data.rows.demands import Demands, Samples
from megatron_omni.data.rows.packer import PackedRows, RowPacker
from megatron_omni.data.rows.stream import evaluation_batches
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.runtime.cli import progress
from megatron_omni.schema import IGNORE, Batch, RowShape

ROW_POSITIONS = 256
"""LLM positions of a row, if no sample is longer: attention on CPU is quadratic in the row, not in the sample."""
ROWS = 4
"""Of a batch."""


@dataclass(frozen=True)
class CodecScores:
    """Per codebook, natural logarithms, codes alone."""

    frames: int
    loss: tuple[float, ...]
    entropy: tuple[float, ...]
    """Unigram entropy of the targets of ``loss``."""
    accuracy: tuple[float, ...]
    end_loss: float
    """Of the end of speech, which only codebook 0 predicts; mean over speeches."""
    end_accuracy: float
    loss_swapped_text: tuple[float, ...] | None = None
    """``loss`` with the codes exchanged among samples of unlike text, codes without a text left in place; None where
    they cannot be exchanged (``samples.exchange_codes``)."""


@dataclass(frozen=True)
class LossSums:
    """Sums over targets, which add up over batches and tasks."""

    text_sum: float
    text_correct: int
    text_count: int
    codec_sum_K: np.ndarray
    """float64, nats, end of speech included."""
    codec_correct_K: np.ndarray
    """int64, end of speech included."""
    histogram_KV: np.ndarray
    """int64 [K, card + 1]: how often each code is a target; the last column counts ends of speech."""
    end_sum: float
    end_correct: int

    @classmethod
    def zero(cls, num_codebooks: int, card: int) -> LossSums:
        zeros_K = np.zeros(num_codebooks, np.int64)
        return cls(0.0, 0, 0, zeros_K.astype(np.float64), zeros_K, np.zeros((num_codebooks, card + 1), np.int64), 0.0, 0)

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(*(getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)))

    @property
    def text_loss(self) -> float | None:
        """Mean over the supervised positions, nats; None if there are none."""
        return self.text_sum / self.text_count if self.text_count else None

    @property
    def text_accuracy(self) -> float | None:
        return self.text_correct / self.text_count if self.text_count else None

    def codec(self, swapped: LossSums | None = None) -> CodecScores | None:
        """The scores, with those of the exchanged codes beside them; None without codes."""
        ends = int(self.histogram_KV[0, -1])
        if not ends:
            return None
        counts_KV = self.histogram_KV[:, :-1]
        return CodecScores(
            frames=int(counts_KV[0].sum()),
            loss=self._codec_loss(),
            entropy=tuple(unigram_entropy(counts_V) for counts_V in counts_KV),
            accuracy=tuple(((self.codec_correct_K - self._at_end(self.end_correct)) / counts_KV.sum(1)).tolist()),
            end_loss=self.end_sum / ends,
            end_accuracy=self.end_correct / ends,
            loss_swapped_text=swapped._codec_loss() if swapped else None,
        )

    def _codec_loss(self) -> tuple[float, ...]:
        loss_K = (self.codec_sum_K - self._at_end(self.end_sum)) / self.histogram_KV[:, :-1].sum(1)
        return tuple(loss_K.tolist())

    def _at_end(self, value: float) -> np.ndarray:
        """``value`` for codebook 0, nothing for the others."""
        return np.array([value] + [0] * (len(self.codec_sum_K) - 1))


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Entropy in nats of the distribution that ``counts_V`` are drawn from, as they show it; 0 for none."""
    share = counts_V[counts_V > 0] / max(counts_V.sum(), 1)
    return max(0.0, -float((share * np.log(share)).sum()))


@torch.inference_mode()
def teacher_forced(model: OmniForConditionalGeneration, tokenizer: OmniTokenizer, samples: Samples, description: str) -> LossSums:
    """Loss sums of ``samples`` under their own targets."""
    config = model.config.model
    assert config.codec is not None
    geometry, delay = EncoderGeometry.of(config), config.audio_head.acoustic_delay
    demands = _measure(samples, tokenizer, geometry, delay)
    shape = row_shape(demands.table, geometry.stack)
    packer = RowPacker(samples, tokenizer, geometry, LogMel(config.features), config.codec, shape, delay)
    batches: Iterable[PackedRows] = evaluation_batches(packer, demands, dp_rank=0, dp_size=1, micro_rows=ROWS)
    total = math.ceil(demands.table[:, 0].sum() / shape.seq / ROWS)
    sums = LossSums.zero(config.codec.num_codebooks, config.codec.card)
    for packed in progress(batches, description, total):
        sums += _score(model, packed.batch.to(model.device), config.codec.card)
    return sums


def row_shape(demands: np.ndarray, stack: int) -> RowShape:
    """A row for samples with these ``demands`` (int [samples, 5], columns as ``RowShape``): holds each, and few are half empty.

    ``stack``: encoder frames per embedding, of which the encoder's room is a multiple.
    """
    largest, total = demands.max(0), demands.sum(0)
    positions = max(ROW_POSITIONS, int(largest[0]))
    # a tenth more than the share that goes with the positions: rows differ
    seq, codec, encoder, spoken, supervised = np.maximum(largest, np.ceil(1.1 * positions * total / total[0])).astype(int).tolist()
    return RowShape(
        seq=min(seq, positions),
        codec=max(codec, 1),
        encoder=max(-(-encoder // stack), 1) * stack,
        spoken=max(spoken, 1),
        supervised=max(-(-supervised // 128), 1) * 128,
    )


def _measure(samples: Samples, tokenizer: OmniTokenizer, geometry: EncoderGeometry, delay: int) -> Demands:
    """As ``data.demands.measure``, but selections are not worth keeping in the user's cache."""
    each = (samples.sample(number) for number in range(len(samples)))
    table = [dataclasses.astuple(demand(sample, render(sample, tokenizer, geometry), geometry, delay)) for sample in each]
    return Demands(np.array(table, np.int32), longest_clip=0)


def _score(model: OmniForConditionalGeneration, batch: Batch, card: int) -> LossSums:
    losses = model.packed_losses(batch)
    targets_BKF = batch.codec_targets_BKF
    targets_KN = targets_BKF.transpose(0, 1).flatten(1).cpu().numpy()
    end_sum, end_correct = 0.0, 0
    if (targets_BKF == card).any():
        # The sums do not tell ends from codes. Only what is summed is masked, not what the model reads; and with an
        # acoustic delay it would read the ends if the codes were to be scored without them.
        ends = dataclasses.replace(batch, codec_targets_BKF=targets_BKF.masked_fill(targets_BKF != card, IGNORE))
        at_ends = model.packed_losses(ends)
        end_sum, end_correct = float(at_ends.codec_sum_K[0]), int(at_ends.codec_correct_K[0])
    return LossSums(
        text_sum=float(losses.text_sum),
        text_correct=int(losses.text_correct),
        text_count=int((batch.targets_BU != IGNORE).sum()),
        codec_sum_K=losses.codec_sum_K.double().cpu().numpy(),
        codec_correct_K=losses.codec_correct_K.cpu().numpy(),
        histogram_KV=np.stack([np.bincount(targets_N[targets_N != IGNORE], minlength=card + 1) for targets_N in targets_KN]),
        end_sum=end_sum,
        end_correct=end_correct,
    )
