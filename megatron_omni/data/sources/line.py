"""A line: one sample as its owner writes it, whatever the collection; and the entry that it becomes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_omni.data.tasks import prompt_for
from megatron_omni.schema import Message, Part, Role, Sample, Task

MAX_ID_BYTES = 80
"""A member's name, the id and its suffix, then fits the 100 bytes of the oldest tar header."""


def _check_id(key: str) -> str:
    if not key or re.search(r"[./\\\s\x00-\x1f\x7f]", key) or key.startswith("__"):
        raise ValueError("an id names tar members: no dot, slash or blank, not empty, no leading '__'; use '-' or '_' instead")
    if len(key.encode()) > MAX_ID_BYTES:
        raise ValueError(f"an id has at most {MAX_ID_BYTES} bytes, this one has {len(key.encode())}; shorten it")
    return key


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class AudioPart(_Strict):
    """A clip that the model hears."""

    type: Literal["audio"]
    audio: str = Field(min_length=1)
    start: float | None = None
    end: float | None = None
    channel: int | None = Field(None, ge=0)


class CodesPart(_Strict):
    """Speech that the model says: ready codes (``.npy``), or a clip to be encoded."""

    type: Literal["codes"]
    codes: str | None = Field(None, min_length=1)
    audio: str | None = Field(None, min_length=1)
    start: float | None = None
    end: float | None = None
    channel: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> CodesPart:
        if (self.codes is None) == (self.audio is None):
            raise ValueError("a codes part has either 'codes' (a .npy file) or 'audio' (a file to encode)")
        return self


AnyPart = TextPart | AudioPart | CodesPart


class Turn(_Strict):
    role: Role
    content: str | list[Annotated[AnyPart, Field(discriminator="type")]]

    @model_validator(mode="after")
    def _parts_fit_the_role(self) -> Turn:
        kinds = {"text"} if isinstance(self.content, str) else {part.type for part in self.content}
        if not kinds:
            raise ValueError("a message has at least one part")
        if "audio" in kinds and self.role != "user":
            raise ValueError(
                f"audio stands in a message of the {self.role}; only the user is heard (an assistant's speech is a codes part)"
            )
        if "codes" in kinds and self.role != "assistant":
            raise ValueError(f"codes stand in a message of the {self.role}; only the assistant speaks in codes")
        return self


class Line(_Strict):
    """One line of a manifest."""

    id: Annotated[str, AfterValidator(_check_id)] = Field(description="unique in the manifest")
    task: Task
    audio: str | None = Field(None, min_length=1, description="file that the user says")
    start: float | None = Field(None, description="seconds; the audio is cut out of a longer recording")
    end: float | None = None
    channel: int | None = Field(None, ge=0, description="of the recording, from 0; by default all are averaged")
    prompt: str | None = Field(None, description="said after the audio; by default the task's own")
    text: str | None = Field(None, description="what the assistant answers")
    target_audio: str | None = Field(None, min_length=1, description="file of the assistant's speech, to be encoded")
    codes: str | None = Field(None, min_length=1, description="file of the assistant's speech as codes [K, T] (.npy)")
    messages: list[Turn] | None = Field(None, min_length=1, description="a whole conversation instead of audio, prompt, text and codes")
    attributes: dict[str, str] = {}
    source: str | None = Field(None, description="collection it comes from; by default the manifest's name")

    @model_validator(mode="after")
    def _one_form(self) -> Line:
        simple = {"audio", "start", "end", "channel", "prompt", "text", "target_audio", "codes"}
        if self.messages is not None:
            if both := sorted(simple & self.model_fields_set):
                raise ValueError(f"'messages' holds the whole conversation; move {', '.join(both)} into it")
            if all(turn.role != "assistant" for turn in self.messages):
                raise ValueError("the messages have no turn of the assistant; there is nothing to learn")
            return self
        if self.audio is None:
            raise ValueError("no 'audio' (a file) and no 'messages'; give one of them")
        if self.target_audio is not None and self.codes is not None:
            raise ValueError("both 'target_audio' and 'codes' are given; keep the one that is right")
        if self.text is None and self.target_audio is None and self.codes is None:
            raise ValueError("no 'text', 'target_audio' or 'codes': nothing to learn; give what the assistant answers")
        return self

    def turns(self) -> list[Turn]:
        """The line as a conversation: the audio and its prompt, then the text and its speech."""
        if self.messages is not None:
            return self.messages
        heard: list[AnyPart] = [AudioPart(type="audio", audio=self.audio or "", start=self.start, end=self.end, channel=self.channel)]
        prompt = prompt_for(self.task) if self.prompt is None else self.prompt
        if prompt:
            heard.append(TextPart(type="text", text=prompt))
        said: list[AnyPart] = []
        if self.text is not None:
            said.append(TextPart(type="text", text=self.text))
        if self.target_audio is not None or self.codes is not None:
            said.append(CodesPart(type="codes", codes=self.codes, audio=self.target_audio))
        return [Turn(role="user", content=heard), Turn(role="assistant", content=said)]


@dataclass(frozen=True)
class Embedded:
    """A file inside a container: a parquet column, a member of a tar."""

    name: str
    """For messages."""
    data: bytes
    offset: int | None = None
    """In its container, if it lies there as it is."""


File = Path | str | Embedded
"""Where a recording or an array lies; a ``str`` is a URL for fsspec."""


@dataclass(frozen=True)
class Clip:
    """A stretch of an audio file, in seconds; None: from its start, to its end, all channels averaged."""

    file: File
    start: float | None = None
    end: float | None = None
    channel: int | None = None


@dataclass(frozen=True)
class Entry:
    """A sample whose arrays are still files."""

    line: int
    """In its collection, from 1."""
    sample: Sample
    """Without lengths."""
    audio: dict[str, Clip]
    """What is heard, by name (``audio0``)."""
    speech: dict[str, Clip]
    """What is said and has to be encoded, by name (``codes0``)."""
    codes: dict[str, File | np.ndarray]
    """What is said and comes as codes, by name (``codes0``)."""

    def files(self) -> list[Path]:
        """Those on local disks."""
        every = [clip.file for clip in (*self.audio.values(), *self.speech.values())] + list(self.codes.values())
        return [file for file in every if isinstance(file, Path)]


@dataclass(frozen=True)
class Reject:
    """A line that gave no sample, or one that gave it with a warning; a line of ``rejects.jsonl``."""

    line: int
    id: str
    reason: str
    rule: str = "input"
    """Of the quality gate; ``input``: the sample cannot be read or is no sample."""
    action: Literal["reject", "warn"] = "reject"
    seconds: float = 0.0
    """Audio heard, where it could be read."""


def locate(base: Path | str, name: str) -> Path | str:
    """``name`` as the collection at ``base`` (a folder or the URL of one) means it."""
    if "://" in name:
        return name
    return base / name if isinstance(base, Path) else f"{base.rstrip('/')}/{name}"


def entry_of(line: Line, number: int, base: Path | str, source: str, embedded: Mapping[str, Embedded | np.ndarray] | None = None) -> Entry:
    """The entry of line ``number``; a file name that is a key of ``embedded`` stands for what lies there."""
    audio: dict[str, Clip] = {}
    speech: dict[str, Clip] = {}
    codes: dict[str, File | np.ndarray] = {}

    def clip(part: AudioPart | CodesPart) -> Clip:
        name = part.audio or ""
        inside = embedded.get(name) if embedded else None
        return Clip(inside if isinstance(inside, Embedded) else locate(base, name), part.start, part.end, part.channel)

    messages = []
    for turn in line.turns():
        parts = []
        for part in [TextPart(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content:
            if isinstance(part, TextPart):
                parts.append(Part("text", part.text))
            elif isinstance(part, AudioPart):
                parts.append(Part("audio", f"audio{len(audio)}"))
                audio[parts[-1].value] = clip(part)
            else:
                parts.append(Part("codes", f"codes{len(speech) + len(codes)}"))
                if part.codes is not None:
                    codes[parts[-1].value] = embedded[part.codes] if embedded and part.codes in embedded else locate(base, part.codes)
                else:
                    speech[parts[-1].value] = clip(part)
        messages.append(Message(turn.role, tuple(parts)))
    sample = Sample(line.id, line.task, source if line.source is None else line.source, tuple(messages), attributes=line.attributes)
    return Entry(number, sample, audio, speech, codes)


def explain(error: ValidationError) -> list[str]:
    """Each fault of a line in words: what, got, expected."""
    faults = []
    for fault in error.errors(include_url=False):
        where = ".".join(str(step) for step in fault["loc"])
        if fault["type"] == "json_invalid":
            faults.append(f"{fault['msg']}; a line is one JSON object in UTF-8")
        elif fault["type"] == "extra_forbidden":
            faults.append(f"unknown key {where!r}; {_nearest(fault['loc'])}")
        elif fault["type"] == "missing":
            faults.append(f"key {where!r} is missing")
        else:
            got = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r:.80}"
            faults.append(f"{where + ': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}{got}")
    return faults


def _nearest(location: Sequence[Any]) -> str:
    known = (
        list(Line.model_fields) if len(location) == 1 else sorted({*Turn.model_fields, *AudioPart.model_fields, *CodesPart.model_fields})
    )
    close = difflib.get_close_matches(str(location[-1]), known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
