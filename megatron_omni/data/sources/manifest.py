"""The manifest: one JSON line per sample, as a person writes it, and what becomes of it.

A line is ``{"id": "utt1", "audio": "wavs/utt1.wav", "text": "three five", "task": "transcribe"}``; see ``Line`` for the
optional keys. Paths are relative to the manifest. A broken manifest (no JSON, an unknown key or task, an id twice) is
refused whole, before any work. What is wrong with one sample (its audio, its text, its codes) shows when it is built.
"""

from __future__ import annotations

import difflib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_omni.data.tasks import prompt_for
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Message, Part, Role, Sample, Task

MAX_FAULTS = 20
"""Faults that one refusal lists."""

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


class CodesPart(_Strict):
    """Speech that the model says: ready codes (``.npy``), or a clip to be encoded."""

    type: Literal["codes"]
    codes: str | None = Field(None, min_length=1)
    audio: str | None = Field(None, min_length=1)
    start: float | None = None
    end: float | None = None

    @model_validator(mode="after")
    def _one_source(self) -> CodesPart:
        if (self.codes is None) == (self.audio is None):
            raise ValueError("a codes part has either 'codes' (a .npy file) or 'audio' (a file to encode)")
        return self


class Turn(_Strict):
    role: Role
    content: str | list[Annotated[TextPart | AudioPart | CodesPart, Field(discriminator="type")]]

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
    prompt: str | None = Field(None, description="said after the audio; by default the task's own")
    text: str | None = Field(None, description="what the assistant answers")
    target_audio: str | None = Field(None, min_length=1, description="file of the assistant's speech, to be encoded")
    codes: str | None = Field(None, min_length=1, description="file of the assistant's speech as codes [K, T] (.npy)")
    messages: list[Turn] | None = Field(None, min_length=1, description="a whole conversation instead of audio, prompt, text and codes")
    attributes: dict[str, str] = {}
    source: str | None = Field(None, description="collection it comes from; by default the manifest's name")

    @model_validator(mode="after")
    def _one_form(self) -> Line:
        simple = {"audio", "start", "end", "prompt", "text", "target_audio", "codes"}
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
        heard: list[TextPart | AudioPart | CodesPart] = [AudioPart(type="audio", audio=self.audio or "", start=self.start, end=self.end)]
        prompt = prompt_for(self.task) if self.prompt is None else self.prompt
        if prompt:
            heard.append(TextPart(type="text", text=prompt))
        said: list[TextPart | AudioPart | CodesPart] = []
        if self.text is not None:
            said.append(TextPart(type="text", text=self.text))
        if self.target_audio is not None or self.codes is not None:
            said.append(CodesPart(type="codes", codes=self.codes, audio=self.target_audio))
        return [Turn(role="user", content=heard), Turn(role="assistant", content=said)]


@dataclass(frozen=True)
class Clip:
    """A stretch of an audio file, in seconds; None: from its start, to its end."""

    path: Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Entry:
    """A sample whose arrays are still files."""

    line: int
    """In the manifest, from 1."""
    sample: Sample
    """Without lengths."""
    audio: dict[str, Clip]
    """What is heard, by name (``audio0``)."""
    speech: dict[str, Clip]
    """What is said and has to be encoded, by name (``codes0``)."""
    codes: dict[str, Path]
    """What is said and comes as codes, by name (``codes0``)."""

    def files(self) -> list[Path]:
        return [*(clip.path for clip in (*self.audio.values(), *self.speech.values())), *self.codes.values()]


class Manifest:
    """A manifest whose every line was checked. Only the place of each line is held in memory."""

    def __init__(self, path: Path, lines: np.ndarray, needs_codec: bool, digest: str) -> None:
        self.path = path
        self._lines = lines
        """int64 [samples, 3]: line number, first byte, byte after the last."""
        self.needs_codec = needs_codec
        """Whether some line has speech to be encoded, or codes to be checked."""
        self.digest = digest
        """xxh3-128 of the file, hex."""

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Checks every line.

        Raises:
            InputError: No such file, no line in it, or faults, of which the first 20 are named by line.
        """
        faults: list[tuple[int, str]] = []
        lines, ids = array("q"), array("Q")
        needs_codec, offset, whole = False, 0, xxhash.xxh3_128()
        try:
            with open(path, "rb") as file:
                for number, raw in enumerate(file, 1):
                    whole.update(raw)
                    offset += len(raw)
                    if not raw.strip():
                        continue
                    try:
                        line = _parse(raw)
                    except ValidationError as error:
                        faults += [(number, fault) for fault in _explain(error)]
                        continue
                    lines.extend((number, offset - len(raw), offset))
                    ids.append(xxhash.xxh3_64_intdigest(line.id.encode()))
                    needs_codec = needs_codec or any(
                        not isinstance(turn.content, str) and any(part.type == "codes" for part in turn.content) for turn in line.turns()
                    )
        except OSError as error:
            raise InputError(f"manifest {path}: cannot be read ({error.strerror}); give a file of JSON lines") from error
        manifest = cls(path, np.array(lines, np.int64).reshape(-1, 3), needs_codec, whole.hexdigest())
        faults += manifest._repeated_ids(np.array(ids, np.uint64))
        if faults:
            faults.sort(key=lambda fault: fault[0])
            shown = [f"{path}:{number}: {fault}" for number, fault in faults[:MAX_FAULTS]]
            more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
            raise InputError("\n".join([f"manifest {path}: faults: {len(faults)}; nothing was built:", *shown, *more]))
        if not len(manifest):
            raise InputError(f"manifest {path}: holds no line; expected one JSON object per sample")
        return manifest

    def __len__(self) -> int:
        return len(self._lines)

    def raw(self, start: int, stop: int) -> list[bytes]:
        """The lines of samples ``start .. stop - 1`` as they stand in the file."""
        with open(self.path, "rb") as file:
            file.seek(self._lines[start, 1])
            block = file.read(int(self._lines[stop - 1, 2] - self._lines[start, 1]))
        places = self._lines[start:stop, 1:] - self._lines[start, 1]
        return [block[first:last] for first, last in places.tolist()]

    def entries(self, start: int, stop: int) -> list[Entry]:
        """Samples ``start .. stop - 1``."""
        numbers = self._lines[start:stop, 0].tolist()
        return [_entry(_parse(raw), number, self.path) for raw, number in zip(self.raw(start, stop), numbers, strict=True)]

    def _repeated_ids(self, hashes: np.ndarray) -> list[tuple[int, str]]:
        """Finds ids that occur twice; equal hashes are looked up, since different ids may share one."""
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        faults = []
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            earlier, later = (_parse(self.raw(sample, sample + 1)[0]).id for sample in (first, second))
            if earlier == later:
                line = int(self._lines[first, 0])
                faults.append((int(self._lines[second, 0]), f"id {later!r} is that of line {line} too; ids are unique: rename or drop one"))
        return faults


def _parse(raw: bytes) -> Line:
    return Line.model_validate_json(raw)


def _entry(line: Line, number: int, manifest: Path) -> Entry:
    folder = manifest.parent
    audio: dict[str, Clip] = {}
    speech: dict[str, Clip] = {}
    codes: dict[str, Path] = {}
    messages = []
    for turn in line.turns():
        parts = []
        for part in [TextPart(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content:
            if isinstance(part, TextPart):
                parts.append(Part("text", part.text))
            elif isinstance(part, AudioPart):
                parts.append(Part("audio", f"audio{len(audio)}"))
                audio[parts[-1].value] = Clip(folder / part.audio, part.start, part.end)
            else:
                parts.append(Part("codes", f"codes{len(speech) + len(codes)}"))
                if part.codes is not None:
                    codes[parts[-1].value] = folder / part.codes
                elif part.audio is not None:
                    speech[parts[-1].value] = Clip(folder / part.audio, part.start, part.end)
        messages.append(Message(turn.role, tuple(parts)))
    source = manifest.stem if line.source is None else line.source
    sample = Sample(line.id, line.task, source, tuple(messages), attributes=line.attributes)
    return Entry(number, sample, audio, speech, codes)


def _explain(error: ValidationError) -> list[str]:
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
