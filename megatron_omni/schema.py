"""The nouns of the project: every value that travels between folders, frozen and typed. Read this first.

Shape letters, used as suffixes of tensor names everywhere:

====  ==========================================  ====  ==========================================
B     rows of a micro-batch                       K     codebooks of the codec
T     LLM positions of a row (``RowShape.seq``)   F     codec-decoder positions of a row
D     width of a hidden state                     A     encoder frames of an encoder row
N     attention heads                             M     mel bins
H     width of one head                           W     wave samples
V     vocabulary (text) or card (codec)           S     spoken-text positions of a row (Pre-NN)
U     supervised text positions of a row          R     encoder rows of a micro-batch
====  ==========================================  ====  ==========================================
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

IGNORE = -100
"""Target value that carries no loss (the convention of torch's cross entropy)."""

Role = Literal["system", "user", "assistant"]
PartType = Literal["text", "audio", "codes"]
Task = Literal["transcribe", "answer", "converse", "empathize", "describe", "speech_to_speech"]
TASKS: tuple[Task, ...] = ("transcribe", "answer", "converse", "empathize", "describe", "speech_to_speech")


# --------------------------------------------------------------------------- samples

_NEW = object.__new__
"""``from_json`` fills ``__dict__`` itself: frozen dataclasses set field by field through ``object.__setattr__``, which takes half
of the time of reading a sample."""


@dataclass(frozen=True)
class Part:
    """One piece of a message: literal text, or the name of an audio or code array of the sample."""

    type: PartType
    value: str
    """The text itself, or the array's name: ``audio0``, ``codes0``, ..."""

    def to_json(self) -> dict[str, str]:
        """Hugging Face chat form: ``{"type": "audio", "audio": "audio0"}``."""
        return {"type": self.type, self.type: self.value}

    @classmethod
    def from_json(cls, data: dict[str, str]) -> Part:
        part = _NEW(cls)
        fields = part.__dict__
        fields["type"] = kind = data["type"]
        fields["value"] = data[kind]
        return part


@dataclass(frozen=True)
class Message:
    role: Role
    content: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        return {"role": self.role, "content": [part.to_json() for part in self.content]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Message:
        message = _NEW(cls)
        fields = message.__dict__
        fields["role"] = data["role"]
        fields["content"] = tuple([Part.from_json(part) for part in data["content"]])
        return message


@dataclass(frozen=True)
class Sample:
    """One conversation, without its arrays (shard format v1)."""

    id: str
    task: Task
    source: str
    messages: tuple[Message, ...]
    num_samples: dict[str, int] = field(default_factory=dict)
    """Wave samples at the encoder's rate (16 kHz) by audio name."""
    num_frames: dict[str, int] = field(default_factory=dict)
    """Codec frames by codes name."""
    attributes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "task": self.task,
            "source": self.source,
            "messages": [message.to_json() for message in self.messages],
            "num_samples": self.num_samples,
            "num_frames": self.num_frames,
            "attributes": self.attributes,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sample:
        sample = _NEW(cls)
        fields = sample.__dict__
        fields["id"] = data["id"]
        fields["task"] = data["task"]
        fields["source"] = data.get("source", "")
        fields["messages"] = tuple([Message.from_json(message) for message in data["messages"]])
        fields["num_samples"] = dict(data.get("num_samples", ()))
        fields["num_frames"] = dict(data.get("num_frames", ()))
        fields["attributes"] = dict(data.get("attributes", ()))
        return sample


@dataclass(frozen=True)
class SampleArrays:
    """The arrays of one sample, decoded from its shard."""

    audio: dict[str, np.ndarray]
    """float32 [W], mono, 16 kHz, by name."""
    codes: dict[str, np.ndarray]
    """uint16 [K, frames], by name."""


# --------------------------------------------------------------------------- rendered text


@dataclass(frozen=True)
class AudioSpan:
    """The run of ``<audio>`` positions that one clip's embeddings replace."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class SpeechSpan:
    """Speech that follows a text: the positions ``[start, stop)`` whose hidden states condition it.

    They are the positions that have read each token of the spoken text, end of turn included. An empty span
    (``start == stop``) is a codec-only answer: one learned vector conditions it.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """A sample as the LLM sees it: token ids, where the loss falls, where audio goes in and speech comes out."""

    token_ids: np.ndarray
    """int32 [tokens]."""
    loss_mask: np.ndarray
    """bool [tokens]; True where the token is a target (it is predicted from the position before it)."""
    audio: tuple[AudioSpan, ...]
    speech: tuple[SpeechSpan, ...]


# --------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class RowShape:
    """Fixed capacities of a training row. Every row has them all, so ranks never differ in what they run."""

    seq: int
    """LLM positions (L)."""
    codec: int
    """Codec-decoder positions (F): the prefix and the frames of each speech segment."""
    encoder: int
    """Encoder frames (A), after the convolutions, gaps between clips included."""
    spoken: int
    """Positions of the Pre-NN (S)."""
    supervised: int
    """Supervised text positions (U), a multiple of 128."""


@dataclass(frozen=True)
class Demand:
    """What one sample takes of a row, in the units of ``RowShape``."""

    seq: int
    codec: int
    encoder: int
    spoken: int
    supervised: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed rows of one data-parallel rank: static shapes, all indices built on the CPU.

    Segment ids count the samples of a row from 0; -1 is padding. Position ids restart in every segment.
    """

    # text
    tokens_BT: torch.Tensor
    """int64; padding holds the pad id."""
    segments_BT: torch.Tensor
    """int32."""
    positions_BT: torch.Tensor
    """int64."""
    audio_source_BT: torch.Tensor
    """int64: flat index into the projected embeddings ``[R * A / stack]`` plus 1; 0 where the token's own embedding stays."""
    supervised_BU: torch.Tensor
    """int64: position in the row whose hidden state predicts the target; 0 in padding."""
    targets_BU: torch.Tensor
    """int64: token id, ``IGNORE`` in padding."""

    # audio encoder; R is B, or a multiple of it where clips had to be dealt to tensor-parallel ranks
    mel_RAM: torch.Tensor
    """float32 [R, A * conv stride, M] log-mel, zero in the gaps between clips."""
    mel_valid_RA: torch.Tensor
    """bool [R, A * conv stride], True on frames of a clip."""
    clip_segments_RA: torch.Tensor
    """int32 [R, A] at the encoder's frame rate; -1 in gaps and padding."""
    clip_positions_RA: torch.Tensor
    """int64 [R, A] frame number inside its clip."""

    # speech
    spoken_BS: torch.Tensor
    """int64: LLM position whose hidden state enters the Pre-NN; -1: the learned vector (codec-only answer); 0 in padding."""
    spoken_segments_BS: torch.Tensor
    """int32, one segment per speech span; -1 in padding."""
    spoken_positions_BS: torch.Tensor
    """int64."""
    prefix_BF: torch.Tensor
    """int64: position in S that this decoder position reads; -1 on frame positions and padding."""
    codes_BKF: torch.Tensor
    """int64: delayed codes fed to the decoder at frame positions; -1 where there is none."""
    codec_segments_BF: torch.Tensor
    """int32."""
    codec_positions_BF: torch.Tensor
    """int64."""
    codec_targets_BKF: torch.Tensor
    """int64: delayed codes predicted at this position, ``card`` for end of speech in codebook 0, ``IGNORE`` elsewhere."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Counts:
    """Numbers of targets, by which the loss sums are divided."""

    text: int
    codec: tuple[int, ...]
    """One per codebook."""

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        codec = (batch.codec_targets_BKF != IGNORE).sum((0, 2))
        return cls(int((batch.targets_BU != IGNORE).sum()), tuple(int(n) for n in codec))


# --------------------------------------------------------------------------- results


@dataclass(frozen=True)
class LossScale:
    """Factor of each summed loss: weight x data-parallel size x accumulation / global count (0 where the count is 0).

    The engine averages over data parallel and accumulation, so with these factors the loss of a step is a sum over the
    whole global batch divided by the global count, whatever the split.
    """

    text: float
    codec: tuple[float, ...]
    """One per codebook."""

    @classmethod
    def of(cls, counts: Counts, text_weight: float, codec_weights: tuple[float, ...], replicas: int) -> LossScale:
        """``counts`` of the whole global batch; ``replicas`` = data-parallel size x accumulation."""

        def factor(weight: float, count: int) -> float:
            return weight * replicas / count if count else 0.0

        return cls(factor(text_weight, counts.text), tuple(map(factor, codec_weights, counts.codec)))


class StepLosses(NamedTuple):
    """What one forward pass returns. A tuple, since ZeRO-3's hooks look for tensors in tuples."""

    loss: torch.Tensor
    """float32 scalar, scaled and attached to the graph."""
    text_sum: torch.Tensor
    """float32 scalar, detached: summed text cross entropy of this rank's rows."""
    text_correct: torch.Tensor
    """int64 scalar."""
    codec_sum_K: torch.Tensor
    """float32 [K], detached."""
    codec_correct_K: torch.Tensor
    """int64 [K]."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, over all ranks: one line of ``metrics.jsonl`` and of the console."""

    step: int
    """Number of the step, from 0."""
    loss: float
    """The weighted sum that was minimised, nats."""
    text_loss: float
    """Mean over the step's text targets, nats."""
    text_accuracy: float
    codec_loss: tuple[float, ...]
    """Mean per codebook, nats."""
    codec_accuracy: tuple[float, ...]
    codec_entropy: tuple[float, ...]
    """Unigram entropy per codebook of the training data, nats: what a model that knows nothing of the text reaches."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    tokens_per_second: float
    """LLM positions that held a token, over all ranks."""
    audio_seconds_per_second: float
    """Seconds of speech heard and spoken per second, over all ranks."""
    fill: dict[str, float]
    """Demand over capacity by resource: seq, codec, encoder, ..."""
    seconds: float
    """Wall time of the step."""
    data_wait_seconds: float
    """Of it, waiting for rows."""
    memory_bytes: int
    """Most memory that a rank held: the device's, or on CPU the process's."""
    data_stall: float = 0.0
    """Share of the step that the rank which waited longest for rows spent so, 0 to 1."""
    skipped_samples: int = 0
    """Planned samples that could not be read, since the process started, over all ranks."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StepReport:
        """The report in ``data``; keys of later versions are left aside, and null (JSON has no NaN) is NaN."""
        names = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {key: _from_json(value) for key, value in data.items() if key in names}
        return cls(**values)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    return math.nan if value is None else value
