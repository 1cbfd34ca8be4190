"""Speaks the demo's corpus: audio files in folders by voice, and a manifest per split, as a user's own recordings would lie.

Half of the statements and a quarter of the questions are to be transcribed (prompt ``Transcribe:``, text only). Of the
others, without a prompt, questions are answered and statements echoed, in text and in the assistant's one voice.

=================  ==========================  =============================================
split              sentences                   voices
=================  ==========================  =============================================
train              76 % of all                 ``TRAIN_VOICES``
dev                8 %, in no other split      half known, half ``DEV_VOICES``
heldout_known      8 %, in no other split      known
heldout_unseen     8 %, in no other split      ``HELDOUT_VOICES``
=================  ==========================  =============================================

The corpus is a pure function of its seed and sizes: a voice is one task, spoken in order by a fresh ``Speaker``.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from megatron_omni.audio.waveform import write_flac
from megatron_omni.demo.espeak import Speaker, Voice
from megatron_omni.demo.grammar import Split, Utterance, draw_split
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.files import atomic_write
from megatron_omni.runtime.seeds import rng


def _voices(names: str, first: int) -> tuple[Voice, ...]:
    """Speeds 140..200 and pitches 35..65 are dealt out so that neighbours differ."""
    pairs = [name.split("+") for name in names.split()]
    return tuple(
        Voice(accent, variant, rate=140 + 17 * n % 61, pitch=35 + 11 * n % 31) for n, (accent, variant) in enumerate(pairs, start=first)
    )


TRAIN_VOICES = _voices(
    "en-us+m1 en+m3 en-us+m4 en-gb-scotland+m5 en-us+m6 en-gb-x-rp+m7 en-us-nyc+m8 en-us+f1 en+f2 en-us+f4 en-gb-x-rp+f5 "
    "en-us+adam en-us-nyc+Alex en+Alicia en-us+Andrea en-gb-x-gbclan+Annie en-us+anika en-029+antonio en-us+belinda en+benjamin "
    "en-us+caleb en-gb-scotland+david en-us+ed en-gb-x-gbcwmd+edward en-us+Gene en+ian en-us+linda en-029+Marco en-us+max "
    "en-us-nyc+Michael en-us+robert en+grandma en-us+Gene2 en-gb-x-rp+aunty en-us+Lee en-gb-scotland+Mike en+zac en-us+iven "
    "en-us+miguel en-us+victor",
    first=0,
)
DEV_VOICES = _voices("en-us+m2 en+shelby en-us-nyc+paul en-us+sandro", first=40)
HELDOUT_VOICES = _voices("en-us+f3 en-us+john en+steph en-us-nyc+travis en-gb-x-rp+Andy", first=50)
"""Variants that no other split has."""

ASSISTANT = Voice("en-us", "Denis", rate=200, pitch=50, melody=0)
"""One note (87.5 Hz, seven periods a codec frame) without flutter: the same words always sound the same."""

PROMPT = "Transcribe:"


@dataclass(frozen=True)
class SpokenCorpus:
    """What ``speak_corpus`` wrote."""

    train: Path
    dev: Path
    heldout_known: Path
    heldout_unseen: Path
    assistant: Path
    """Folder of the assistant's clips."""
    utterances: int
    hours: float
    """Of the utterances, the assistant's clips not counted."""


@dataclass(frozen=True)
class _Work:
    """All clips of one voice."""

    voice: Voice
    clips: tuple[tuple[Path, str], ...]


def speak_corpus(
    out: Path, num_train: int = 20000, num_dev: int = 400, num_heldout: int = 400, seed: int = 4, workers: int = 2
) -> SpokenCorpus:
    """Writes the corpus under ``out``: ``voices/NAME/ID.flac``, ``assistant/WORDS.flac`` and four manifests, ``SPLIT.jsonl``.

    A manifest appears only when all of its audio lies there.

    Args:
        num_heldout: Utterances of each of the two held-out splits.
        workers: Processes that speak; the result does not depend on it.
    """
    sizes: dict[Split, int] = {"train": num_train, "dev": num_dev, "heldout_known": num_heldout, "heldout_unseen": num_heldout}
    voices: dict[Split, tuple[Voice, ...]] = {
        "train": TRAIN_VOICES,
        "dev": TRAIN_VOICES,
        "heldout_known": TRAIN_VOICES,
        "heldout_unseen": HELDOUT_VOICES,
    }
    lines: dict[Split, list[bytes]] = {}
    clips: dict[Voice, dict[Path, str]] = defaultdict(dict)
    for split, size in sizes.items():
        random = rng("corpus", seed, split)
        lines[split] = []
        for number, utterance in enumerate(draw_split(random, split, size, seed)):
            choice = DEV_VOICES if split == "dev" and number % 2 else voices[split]
            voice = choice[random.integers(len(choice))]
            name = f"{split.replace('_', '-')}-{number:05d}"
            audio = Path("voices", voice.name, f"{name}.flac")
            clips[voice][audio] = utterance.text
            reply = None
            if random.random() < (0.75 if utterance.is_question else 0.5):
                reply = Path("assistant", f"{utterance.reply.replace(' ', '-')}.flac")
                clips[ASSISTANT][reply] = utterance.reply
            lines[split].append(_line(name, audio, utterance, voice, reply))

    work = [_Work(voice, tuple((out / path, text) for path, text in of_voice.items())) for voice, of_voice in clips.items()]
    work.sort(key=lambda item: -len(item.clips))
    seconds = 0.0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        spoken: Iterable[tuple[Voice, float]] = pool.imap_unordered(_speak_voice, work)
        for voice, voice_seconds in progress(spoken, "speaking", total=len(work)):
            seconds += voice_seconds if voice != ASSISTANT else 0.0
    for split, content in lines.items():
        atomic_write(out / f"{split}.jsonl", b"".join(content))
    return SpokenCorpus(
        train=out / "train.jsonl",
        dev=out / "dev.jsonl",
        heldout_known=out / "heldout_known.jsonl",
        heldout_unseen=out / "heldout_unseen.jsonl",
        assistant=out / "assistant",
        utterances=sum(sizes.values()),
        hours=seconds / 3600,
    )


def _line(name: str, audio: Path, utterance: Utterance, voice: Voice, reply: Path | None) -> bytes:
    """A manifest line; without a reply in speech the utterance is to be transcribed."""
    line: dict[str, str | dict[str, str]] = {"id": name, "audio": str(audio)}
    if reply is None:
        line |= {"text": utterance.text, "task": "transcribe", "prompt": PROMPT}
    else:
        task = "answer" if utterance.is_question else "speech_to_speech"
        line |= {"text": utterance.reply, "task": task, "target_audio": str(reply)}
    line["attributes"] = {"voice": voice.name, "kind": utterance.kind, "transcript": utterance.text}
    return orjson.dumps(line) + b"\n"


def _speak_voice(work: _Work) -> tuple[Voice, float]:
    """Speaks and writes all clips of a voice; returns their seconds."""
    speaker = Speaker()
    seconds = 0.0
    for path, text in work.clips:
        wave, rate = speaker.speak(text, work.voice)
        wave = trim(wave, rate)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write_flac(wave, rate))
        seconds += len(wave) / rate
    return work.voice, seconds


def trim(wave: np.ndarray, rate: int, margin: float = 0.02) -> np.ndarray:
    """Cuts what lies more than ``margin`` seconds outside the first and last sample above 1 % of the peak; float32 [W]."""
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    if loud.size == 0:
        return wave
    extra = round(margin * rate)
    return wave[max(0, loud[0] - extra) : loud[-1] + 1 + extra]
