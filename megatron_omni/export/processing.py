"""``OmniProcessor``: conversations with audio -> the inputs of ``OmniForConditionalGeneration``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from megatron_omni.audio.features import LogMel
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.audio.waveform import read_audio, resample
from megatron_omni.config.model import FeatureConfig, ModelConfig
from megatron_omni.data.render import render_prompt
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Message, Part, Rendered

Chat = Sequence[dict[str, Any]]
"""``[{"role": "user", "content": [{"type": "audio", "audio": wave or path}, {"type": "text", "text": "Transcribe:"}]}]``."""


class OmniProcessor(ProcessorMixin):
    """The tokenizer, the features' settings and the encoder's geometry."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        features: dict[str, Any],
        conv_strides: Sequence[int] = (1, 2),
        stack: int = 4,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.features = features
        self.conv_strides = list(conv_strides)
        self.stack = stack
        settings = FeatureConfig.model_validate(features)
        self._rate = settings.sample_rate
        self._log_mel = LogMel(settings)
        self._geometry = EncoderGeometry(settings.hop_length, tuple(conv_strides), stack)
        self._text = OmniTokenizer(tokenizer)

    @classmethod
    def of(cls, model: ModelConfig, tokenizer: OmniTokenizer) -> OmniProcessor:
        return cls(tokenizer.hf, model.features.model_dump(mode="json"), model.encoder.conv_strides, model.projector.stride)

    @property
    def sampling_rate(self) -> int:
        """Hz of the waves that ``__call__`` takes."""
        return self._rate

    def __call__(self, messages: Chat | Sequence[Chat]) -> BatchFeature:
        """One conversation, or a list of them, up to the assistant's next turn.

        An audio part holds a float32 mono wave ``[W]`` at ``sampling_rate``, or the path of an audio file.

        Returns:
            Tensors for ``generate`` and ``generate_speech``: ``input_ids`` and ``attention_mask`` ``[B, T]``, padded on
            the left; ``audio_source_BT``; and the encoder's rows, one clip each (``schema.Batch`` describes them).

        Raises:
            InputError: a part that its turn cannot hold, an unreadable or empty audio.
        """
        chats: Sequence[Chat] = [messages] if messages and isinstance(messages[0], dict) else messages  # type: ignore[list-item, assignment]
        if not chats:
            raise InputError("no conversation was given")
        waves: list[list[np.ndarray]] = []
        rendered: list[Rendered] = []
        for chat in chats:
            parsed, own = self._parse(chat)
            waves.append(own)
            lengths = {f"audio{number}": len(wave) for number, wave in enumerate(own)}
            rendered.append(render_prompt(parsed, lengths, self._text, self._geometry))
        return self._inputs(rendered, waves)

    def decode(self, ids: Any, **options: Any) -> str:
        """Text of one answer's ids; special tokens are left out."""
        return self._text.decode(_to_list(ids))

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """Text of each answer."""
        return [self._text.decode(_to_list(ids)) for ids in sequences]

    def _parse(self, chat: Chat) -> tuple[list[Message], list[np.ndarray]]:
        """The conversation in our own types, and its waves in the order of their names."""
        messages: list[Message] = []
        waves: list[np.ndarray] = []
        for turn in chat:
            content = turn["content"]
            parts = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "audio":
                    parts.append(Part("audio", f"audio{len(waves)}"))
                    waves.append(self._wave(part["audio"]))
                elif part["type"] == "text":
                    parts.append(Part("text", part["text"]))
                else:
                    raise InputError(f"a part of type {part['type']!r} in a turn of the {turn['role']}; expected audio or text")
            messages.append(Message(turn["role"], tuple(parts)))
        return messages, waves

    def _wave(self, audio: np.ndarray | str | Path) -> np.ndarray:
        if isinstance(audio, str | Path):
            return resample(*read_audio(Path(audio)), self._rate)
        return np.asarray(audio, np.float32)

    def _inputs(self, rendered: Sequence[Rendered], waves: Sequence[Sequence[np.ndarray]]) -> BatchFeature:
        geometry = self._geometry
        clips = [wave for own in waves for wave in own]
        frames_A = [geometry.encoder_frames(len(wave)) for wave in clips]
        slots = [geometry.slot(len(wave)) for wave in clips]
        R, A = max(1, len(clips)), max(slots, default=geometry.stack)  # at least one row, so that text alone works too
        T = max(len(one.token_ids) for one in rendered)

        mel_RAM = np.zeros((R, A * geometry.conv_stride, self._log_mel.config.num_mel_bins), np.float32)
        valid_RA = np.zeros(mel_RAM.shape[:2], bool)
        segments_RA = np.full((R, A), -1, np.int32)
        positions_RA = np.zeros((R, A), np.int64)
        for row, (wave, frames) in enumerate(zip(clips, frames_A, strict=True)):
            mel = self._log_mel(wave)
            mel_RAM[row, : len(mel)] = mel
            valid_RA[row, : len(mel)] = True
            segments_RA[row, :frames] = 0
            positions_RA[row, :frames] = np.arange(frames)

        ids_BT = np.full((len(rendered), T), self._text.pad_id, np.int64)
        mask_BT = np.zeros_like(ids_BT)
        source_BT = np.zeros_like(ids_BT)
        row = 0
        for index, one in enumerate(rendered):
            shift = T - len(one.token_ids)
            ids_BT[index, shift:] = one.token_ids
            mask_BT[index, shift:] = 1
            for span in one.audio:
                start = shift + span.start
                source_BT[index, start : start + span.length] = 1 + row * (A // geometry.stack) + np.arange(span.length)
                row += 1
        arrays = {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "mel_RAM": mel_RAM,
            "mel_valid_RA": valid_RA,
            "clip_segments_RA": segments_RA,
            "clip_positions_RA": positions_RA,
            "audio_source_BT": source_BT,
        }
        return BatchFeature({name: torch.from_numpy(array) for name, array in arrays.items()})


def _to_list(ids: Any) -> list[int]:
    return [int(number) for number in ids]
