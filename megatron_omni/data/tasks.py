"""The tasks that a model learns: the prompt of each, how its target is written, and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_omni.schema import Task

Metric = Literal["wer", "exact_match", "loss"]


@dataclass(frozen=True)
class TaskFormat:
    """One row of the task table; a new task is a new row here and a new name in ``schema.TASKS``."""

    prompt: str | None
    """What the user turn says after the audio; None: nothing, the model answers what it hears."""
    lower_case: bool
    """Targets are lower-cased, as recognition sets are scored."""
    metric: Metric
    """``loss``: open answers, which no reference text scores."""


FORMATS: dict[Task, TaskFormat] = {
    "transcribe": TaskFormat("Transcribe:", lower_case=True, metric="wer"),
    "answer": TaskFormat(None, lower_case=True, metric="exact_match"),
    "converse": TaskFormat(None, lower_case=False, metric="loss"),
    "empathize": TaskFormat(None, lower_case=False, metric="loss"),
    "describe": TaskFormat("Describe all information you can hear:", lower_case=False, metric="loss"),
    "speech_to_speech": TaskFormat(None, lower_case=True, metric="wer"),
}


def prompt_for(task: Task) -> str | None:
    return FORMATS[task].prompt


def target_text(task: Task, text: str) -> str:
    """The text as the model is to say it; scorers apply it to their references too."""
    return text.lower() if FORMATS[task].lower_case else text
