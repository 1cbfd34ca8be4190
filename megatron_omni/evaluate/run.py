"""Scores an exported model on shards: what it says against what it should say, and how well it predicts the targets.

The report is one JSON object, its waves beside it::

    {"model": ..., "shards": [...], "data": fingerprint, "normalization": ...,
     "transcribe": TaskScores, "answer": TaskScores, ..., "codec": CodecScores, "seconds": ...,
     "samples": [Answer, ...]}
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_omni.data.rows.demands import Samples
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.tasks import FORMATS, Metric
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.evaluate.answers import Recording, generate_texts, record_speech
from megatron_omni.evaluate.losses import CodecScores, LossSums, teacher_forced
from megatron_omni.evaluate.samples import Selection, answer, exchange_codes, last_codes
from megatron_omni.evaluate.scores import NORMALIZATION, TextScores, score
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.export.processing import OmniProcessor
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_write
from megatron_omni.schema import Sample, Task


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task; the text scores are of what the model generated, the losses of the targets, teacher-forced."""

    samples: int
    metric: Metric
    """Which of the scores judges this task."""
    wer: float | None
    """Text scores are None where no answer has a text."""
    cer: float | None
    exact_match: float | None
    text_loss: float | None
    """Mean over answer tokens, nats."""
    text_accuracy: float | None
    codec: CodecScores | None
    by: dict[str, dict[str, TextScores]]
    """Text scores by attribute and its value: ``by["kind"]["digits"].wer``."""


@dataclass(frozen=True)
class Evaluation:
    tasks: dict[Task, TaskScores]
    codec: CodecScores | None
    """Over all tasks."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Summary of ``tools/evaluate.py`` and head of its report: the tasks, then the rest, side by side."""
        return {**{task: dataclasses.asdict(scores) for task, scores in self.tasks.items()}, "codec": self.codec, "seconds": self.seconds}


@dataclass(frozen=True)
class Answer:
    """What the model said to one sample: an entry of the report's ``samples``."""

    id: str
    task: Task
    reference: str
    """Empty for an answer in codes only, which no text score counts."""
    hypothesis: str
    attributes: dict[str, str]
    input_wav: str | None = None
    """Paths relative to the report; see ``answers.Recording``."""
    target_wav: str | None = None
    generated_wav: str | None = None


def evaluate(
    model_dir: Path,
    shards: Sequence[Path],
    report: Path | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    speech_samples: int = 6,
    by: Sequence[str] = (),
    device: str = "cpu",
) -> Evaluation:
    """Scores the exported model in ``model_dir`` on the data sets ``shards``; the same call gives the same numbers.

    Args:
        report: JSON file to write: the scores, and every sample with what was generated. Waves go beside it.
        batch_size: Conversations for which text is generated at once.
        max_samples: Score so many, evenly spaced over the data sets; None: all.
        speech_samples: Speeches to record for the report, evenly spaced over the samples that hold any.
        by: Attributes of samples, each of whose values is scored apart too.

    Raises:
        InputError: no such model or data set, one made with another codec, or nothing to score.
    """
    model = OmniForConditionalGeneration.from_pretrained(model_dir).to(device).eval()
    processor = OmniProcessor.from_pretrained(model_dir)
    tokenizer = OmniTokenizer.load(model_dir)
    dataset = ShardedDataset.open(list(shards))
    samples = Selection(dataset, spread(range(len(dataset)), max_samples))
    folder = report.parent / f"{report.stem}-speech" if report else None
    evaluation, answers = evaluate_samples(model, processor, tokenizer, samples, batch_size, by, folder, speech_samples)
    if report:
        document = {
            "model": str(model_dir),
            "shards": [str(path) for path in shards],
            "data": dataset.fingerprint,
            "normalization": NORMALIZATION,
            **evaluation.to_json(),
            "samples": answers,
        }
        atomic_write(report, orjson.dumps(document, option=orjson.OPT_INDENT_2))
    return evaluation


def evaluate_samples(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    tokenizer: OmniTokenizer,
    samples: Samples,
    batch_size: int = 64,
    by: Sequence[str] = (),
    speech_folder: Path | None = None,
    speech_samples: int = 6,
) -> tuple[Evaluation, list[Answer]]:
    """``evaluate`` on what is loaded already; also every answer, in the order of ``samples``."""
    started = time.monotonic()
    records = [samples.sample(number) for number in range(len(samples))]
    _require_scorable(model, samples, records)
    references = [answer(record) or "" for record in records]
    # Twice the longest: room to be wrong at length. One limit for all, or a sample's text would depend on its batch.
    max_new_tokens = 2 * max(len(tokenizer.encode(text)) for text in references) + 8
    hypotheses = generate_texts(model, processor, samples, batch_size, max_new_tokens)
    own, swapped = _losses(model, tokenizer, samples, records)
    recordings: dict[int, Recording] = {}
    if speech_folder:
        speaking = spread([number for number, record in enumerate(records) if last_codes(record)], speech_samples)
        recordings = record_speech(model, processor, samples, speaking, speech_folder, max_new_tokens)
    answers = [
        Answer(record.id, record.task, reference, hypothesis, record.attributes, *recordings.get(number, ()))
        for number, (record, reference, hypothesis) in enumerate(zip(records, references, hypotheses, strict=True))
    ]
    tasks = {task: _task_scores([one for one in answers if one.task == task], own[task], swapped.get(task), by) for task in sorted(own)}
    codec = _total(own.values()).codec(_total(swapped.values()) if swapped else None)
    return Evaluation(tasks, codec, time.monotonic() - started), answers


def spread(numbers: Sequence[int], count: int | None) -> list[int]:
    """``count`` of ``numbers``, evenly spaced from the first on; all if they are no more."""
    if count is None or count >= len(numbers):
        return list(numbers)
    return [numbers[place] for place in np.linspace(0, len(numbers), count, endpoint=False).astype(int)]


def _require_scorable(model: OmniForConditionalGeneration, samples: Samples, records: Sequence[Sample]) -> None:
    if not records:
        raise InputError("the data sets hold no samples to score")
    ours, theirs = model.config.model.codec, samples.codec
    if theirs is not None and theirs != ours:
        raise InputError(f"the shards hold codes of another codec ({theirs}) than the model speaks ({ours})")


def _losses(
    model: OmniForConditionalGeneration, tokenizer: OmniTokenizer, samples: Samples, records: Sequence[Sample]
) -> tuple[dict[Task, LossSums], dict[Task, LossSums]]:
    """By task, with the codes of each sample and with those of another; the latter empty where they cannot be exchanged."""
    members: dict[Task, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        members[record.task].append(number)
    own = {task: teacher_forced(model, tokenizer, Selection(samples, numbers), f"losses: {task}") for task, numbers in members.items()}
    donors = exchange_codes(records)
    if donors is None:
        return own, {}
    speaking = {task: [number for number in numbers if records[number].num_frames] for task, numbers in members.items()}
    swapped = {
        task: teacher_forced(model, tokenizer, Selection(samples, numbers, donors), f"losses, codes exchanged: {task}")
        for task, numbers in speaking.items()
        if numbers
    }
    return own, swapped


def _task_scores(answers: Sequence[Answer], own: LossSums, swapped: LossSums | None, by: Sequence[str]) -> TaskScores:
    def scored(chosen: Iterable[Answer]) -> TextScores | None:
        pairs = [(one.reference, one.hypothesis) for one in chosen if one.reference]
        return score(*zip(*pairs, strict=True)) if pairs else None

    groups = {attribute: sorted({one.attributes[attribute] for one in answers if attribute in one.attributes}) for attribute in by}
    text = scored(answers)
    return TaskScores(
        samples=len(answers),
        metric=FORMATS[answers[0].task].metric,
        wer=text.wer if text else None,
        cer=text.cer if text else None,
        exact_match=text.exact_match if text else None,
        text_loss=own.text_loss,
        text_accuracy=own.text_accuracy,
        codec=own.codec(swapped),
        by={
            attribute: {
                value: group for value in values if (group := scored(one for one in answers if one.attributes.get(attribute) == value))
            }
            for attribute, values in groups.items()
        },
    )


def _total(sums: Iterable[LossSums]) -> LossSums:
    return functools.reduce(operator.add, sums)
