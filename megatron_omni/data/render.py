"""A conversation as token ids: the only place that knows the chat template, the loss mask and where audio and speech are.

A user turn is its audio placeholders, then " " and the prompt if there is one. An assistant turn is its text, then
codes if any. Loss falls on each assistant text and the end of its turn. Rendering a sample up to its answer gives
exactly the first tokens of rendering it whole, so generation starts from what training showed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_omni.audio.delay import num_steps
from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.tasks import target_text
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import AudioSpan, Demand, Message, Part, Rendered, Role, Sample, SpeechSpan


def render(sample: Sample, tokenizer: OmniTokenizer, geometry: EncoderGeometry) -> Rendered:
    """The whole conversation with its targets.

    Raises:
        InputError: a part that its turn cannot hold, or an audio whose length the sample does not give.
    """
    try:
        messages = [_target(message, sample) if message.role == "assistant" else message for message in sample.messages]
        return _render(messages, sample.num_samples, tokenizer, geometry)
    except InputError as error:
        raise InputError(f"sample {sample.id}: {error}") from error


def render_prompt(
    messages: Sequence[Message], num_samples: Mapping[str, int], tokenizer: OmniTokenizer, geometry: EncoderGeometry
) -> Rendered:
    """The conversation so far and the header of the assistant's next turn; no loss falls on it.

    ``num_samples`` gives the length of each audio, in wave samples at the encoder's rate.
    """
    if not messages or messages[-1].role == "assistant":
        raise InputError("a prompt ends with a turn of the user (or system), not of the assistant")
    whole = _render([*messages, Message("assistant", ())], num_samples, tokenizer, geometry)
    roles: tuple[Role, ...] = (*(message.role for message in messages), "assistant")
    length = len(whole.token_ids) - len(tokenizer.template(roles)[-1])
    return Rendered(whole.token_ids[:length], np.zeros(length, bool), whole.audio, whole.speech)


def demand(sample: Sample, rendered: Rendered, geometry: EncoderGeometry, acoustic_delay: int) -> Demand:
    """What the sample takes of a row; see ``RowShape`` for the units."""
    prefixes = [max(1, span.stop - span.start) for span in rendered.speech]
    steps = [num_steps(sample.num_frames[span.name], acoustic_delay) for span in rendered.speech]
    return Demand(
        seq=len(rendered.token_ids),
        codec=sum(prefixes) + sum(steps) - len(steps),
        encoder=sum(geometry.slot(sample.num_samples[span.name]) for span in rendered.audio),
        spoken=sum(prefixes),
        supervised=int(rendered.loss_mask.sum()),
    )


def _target(message: Message, sample: Sample) -> Message:
    """The assistant's turn as it is to be said: the task's letter case on its texts."""
    parts = (Part("text", target_text(sample.task, part.value)) if part.type == "text" else part for part in message.content)
    return Message("assistant", tuple(parts))


def _render(messages: Sequence[Message], num_samples: Mapping[str, int], tokenizer: OmniTokenizer, geometry: EncoderGeometry) -> Rendered:
    template = tokenizer.template(tuple(message.role for message in messages))
    tokens: list[int] = template[0].tolist()
    targets: list[tuple[int, int]] = []
    audio: list[AudioSpan] = []
    speech: list[SpeechSpan] = []
    for message, after in zip(messages, template[1:], strict=True):
        start = len(tokens)
        spoken = (start, start)
        open_spans: list[int] = []  # speech spans of the turn's last text: they also take the end of turn
        for number, part in enumerate(message.content):
            _check(part, message.role, num_samples)
            if part.type == "audio":
                length = geometry.num_audio_embeddings(num_samples[part.value])
                audio.append(AudioSpan(part.value, len(tokens), length))
                tokens += [tokenizer.audio_id] * length
            elif part.type == "text":
                text_start = len(tokens)
                tokens += tokenizer.encode(part.value if number == 0 else " " + part.value)
                spoken, open_spans = (text_start, len(tokens)), []
            else:
                open_spans.append(len(speech))
                speech.append(SpeechSpan(part.value, *spoken))
        if message.role == "assistant":
            ending = after.tolist()
            if tokenizer.eos_id not in ending:
                raise InputError("the chat template does not end the assistant's turn with the tokenizer's end-of-sequence token")
            stop = len(tokens) + ending.index(tokenizer.eos_id) + 1
            targets.append((start, stop))
            if spoken[0] < spoken[1]:
                for span in open_spans:
                    speech[span] = SpeechSpan(speech[span].name, spoken[0], stop)
        tokens += after.tolist()
    loss_mask = np.zeros(len(tokens), bool)
    for start, stop in targets:
        loss_mask[start:stop] = True
    loss_mask[:1] = False  # nothing comes before the first token that could predict it
    return Rendered(np.array(tokens, np.int32), loss_mask, tuple(audio), tuple(speech))


def _check(part: Part, role: Role, num_samples: Mapping[str, int]) -> None:
    if part.type == "codes" and role != "assistant":
        raise InputError(f"{part.value} stands in a turn of the {role}; only an assistant's turn holds codes")
    if part.type == "audio" and role != "user":
        raise InputError(f"{part.value} stands in a turn of the {role}; only a user's turn holds audio (an assistant's speech is codes)")
    if part.type == "audio" and part.value not in num_samples:
        raise InputError(f"num_samples has no entry for {part.value}; it has {sorted(num_samples)}")
