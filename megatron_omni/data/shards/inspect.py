"""What a data set holds: totals, durations and text lengths per task, the entropy of each codebook, and a page with samples to hear."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import plotly.graph_objects as go
import soundfile
from plotly.offline import get_plotlyjs

from megatron_omni.audio.codec import Mimi
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.info import AUDIO_RATE, DatasetInfo
from megatron_omni.runtime.cli import progress
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_write
from megatron_omni.runtime.seeds import rng
from megatron_omni.schema import Sample

READ = 20_000
"""Samples whose texts and codes are read, at random where there are more; totals and hours are of all."""


@dataclass(frozen=True)
class Spread:
    """Percentiles 0, 10, 50, 90 and 100, and the mean."""

    minimum: float
    p10: float
    median: float
    p90: float
    maximum: float
    mean: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        minimum, p10, median, p90, maximum = (float(value) for value in np.percentile(values, (0, 10, 50, 90, 100)))
        return cls(minimum, p10, median, p90, maximum, float(values.mean()))


@dataclass(frozen=True)
class TaskSummary:
    """Of one task; samples and hours are estimated where only ``READ`` samples are read."""

    samples: int
    hours: float
    """Of audio heard."""
    seconds: Spread
    """Of audio heard, by sample."""
    characters: Spread
    """Of the assistant's text, by sample read."""
    speech_seconds: Spread | None
    """Of the assistant's speech, by sample; None where there is none."""


@dataclass(frozen=True)
class InspectSummary:
    samples: int
    shards: int
    hours: float
    speech_hours: float
    tasks: dict[str, TaskSummary]
    codec: str | None
    entropy: list[float]
    """Nats, by codebook, of the codes read; log(card) is the most."""
    largest_entropy: float | None
    samples_read: int
    page: str | None


@dataclass(frozen=True)
class _Lengths:
    """By sample of one task."""

    seconds: np.ndarray
    characters: np.ndarray
    speech_seconds: np.ndarray


@dataclass(frozen=True)
class _Player:
    label: str
    audio: str
    """data: URL."""


@dataclass(frozen=True)
class _Heard:
    id: str
    task: str
    text: str
    players: list[_Player]


def inspect_shards(folder: Path, page: Path | None = None, codec: Mimi | None = None, samples: int = 8, seed: int = 0) -> InspectSummary:
    """Reads the indexes of all shards, and texts and codes of up to ``READ`` samples.

    Args:
        page: An HTML file to write, with histograms and ``samples`` samples to hear.
        codec: Decodes codes for the page; None: only what is stored as audio can be heard.

    Raises:
        InputError: There is no finished data set in ``folder``, or ``codec`` is not the one that made its codes.
        WorkError: A member that is read is damaged.
    """
    info, data = DatasetInfo.read(folder), ShardedDataset.open([folder])
    if codec is not None and info.codec is not None and codec.weights_hash != info.codec.weights_hash:
        raise InputError(
            f"{folder}: its codes are of {info.codec.name} ({info.codec.weights_hash[:12]}...), the codec given has the weights "
            f"{codec.weights_hash[:12]}... and would play noise; give --codec {info.codec.name}"
        )
    order = rng("inspect", seed).permutation(len(data)) if len(data) > READ else np.arange(len(data))
    rate = info.codec.frame_rate if info.codec is not None else 1.0
    counts = np.zeros((info.codec.num_codebooks, info.codec.card), np.int64) if info.codec is not None else np.zeros((0, 1), np.int64)
    by_task: dict[str, list[tuple[float, int, float]]] = defaultdict(list)
    for number in progress(np.sort(order[:READ]).tolist(), "reading samples"):
        sample = data.sample(number)
        seconds, speech = sum(sample.num_samples.values()) / AUDIO_RATE, sum(sample.num_frames.values()) / rate
        by_task[sample.task].append((seconds, len(_answer(sample)), speech))
        for codes_KT in data.codes(number).values():
            for codebook, codes_T in enumerate(codes_KT):
                counts[codebook] += np.bincount(codes_T, minlength=counts.shape[1])
    lengths = {task: _Lengths(*(np.array(column) for column in zip(*rows, strict=True))) for task, rows in sorted(by_task.items())}
    scale = len(data) / max(1, min(READ, len(data)))
    summary = InspectSummary(
        samples=len(data),
        shards=info.totals.shards,
        hours=info.totals.hours,
        speech_hours=info.totals.speech_hours,
        tasks={task: _summary(of_task, scale) for task, of_task in lengths.items()},
        codec=None if info.codec is None else info.codec.name,
        entropy=_entropy(counts),
        largest_entropy=None if info.codec is None else float(np.log(info.codec.card)),
        samples_read=min(READ, len(data)),
        page=None if page is None else str(page),
    )
    if page is not None:
        heard = [_heard(data, int(number), codec) for number in rng("listen", seed).permutation(len(data))[:samples]]
        atomic_write(page, _page(folder.name, summary, lengths, counts, heard))
    return summary


def _summary(lengths: _Lengths, scale: float) -> TaskSummary:
    """``scale``: samples of the data set for one that was read."""
    spoken = lengths.speech_seconds[lengths.speech_seconds > 0]
    return TaskSummary(
        samples=round(scale * len(lengths.seconds)),
        hours=scale * float(lengths.seconds.sum()) / 3600,
        seconds=Spread.of(lengths.seconds),
        characters=Spread.of(lengths.characters),
        speech_seconds=Spread.of(spoken) if len(spoken) else None,
    )


def _entropy(counts_KV: np.ndarray) -> list[float]:
    share = counts_KV / np.maximum(counts_KV.sum(1, keepdims=True), 1)
    return (-(share * np.log(np.where(share > 0, share, 1.0))).sum(1)).tolist()


def _answer(sample: Sample) -> str:
    return " ".join(
        part.value for message in sample.messages if message.role == "assistant" for part in message.content if part.type == "text"
    )


def _heard(data: ShardedDataset, number: int, codec: Mimi | None) -> _Heard:
    sample, arrays = data.sample(number), data.arrays(number)
    players = [_Player(f"{name}, as stored", _data_url(wave, AUDIO_RATE)) for name, wave in arrays.audio.items()]
    if codec is not None:
        players += [_Player(f"{name}, decoded", _data_url(codec.decode(codes), codec.sample_rate)) for name, codes in arrays.codes.items()]
    return _Heard(sample.id, sample.task, _answer(sample), players)


def _data_url(wave: np.ndarray, rate: int) -> str:
    data = io.BytesIO()
    soundfile.write(data, np.clip(wave, -1, 1), rate, format="WAV", subtype="PCM_16")
    return f"data:audio/wav;base64,{base64.b64encode(data.getvalue()).decode()}"


def _page(name: str, summary: InspectSummary, lengths: dict[str, _Lengths], counts_KV: np.ndarray, heard: list[_Heard]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    charts = [
        figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"chart-{number}")
        for number, figure in enumerate(_figures(lengths, counts_KV))
    ]
    return environment.get_template("inspect.html").render(name=name, summary=summary, charts=charts, heard=heard, plotly=get_plotlyjs())


def _figures(lengths: dict[str, _Lengths], counts_KV: np.ndarray) -> Iterator[go.Figure]:
    for title, column in (
        ("audio heard, seconds", "seconds"),
        ("answer's text, characters", "characters"),
        ("speech, seconds", "speech_seconds"),
    ):
        figure = go.Figure([go.Histogram(x=getattr(of_task, column), name=task, opacity=0.6) for task, of_task in lengths.items()])
        yield figure.update_layout(title=title, barmode="overlay", height=320, margin={"t": 40, "b": 30})
    if len(counts_KV):
        ranked = -np.sort(-counts_KV, axis=1) / np.maximum(counts_KV.sum(1, keepdims=True), 1)
        lines = [go.Scatter(y=row, name=f"codebook {number}", mode="lines") for number, row in enumerate(ranked)]
        figure = go.Figure(lines).update_yaxes(type="log")
        yield figure.update_layout(title="share of each code, most frequent first", height=320, margin={"t": 40, "b": 30})
