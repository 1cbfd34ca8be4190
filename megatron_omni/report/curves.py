"""A run's metrics as charts: one small figure per question, so that a page can lay them out for any screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from megatron_omni.schema import StepReport

Runs = Mapping[str, Sequence[StepReport]]
"""Step reports by run name, in step order."""

PALETTE = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
"""One colour per run; they repeat from the ninth run on."""
REFERENCE = "#6b7280"
MAX_POINTS = 2000
"""Points per line; longer runs are thinned, after smoothing."""


@dataclass(frozen=True)
class Chart:
    title: str
    figure: go.Figure


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    charts: tuple[Chart, ...]


def sections(runs: Runs) -> list[Section]:
    """All charts of ``runs``, which are overlaid in each; charts of which no run has a value are left out."""
    codebooks = max((len(report.codec_loss) for reports in runs.values() for report in reports[:1]), default=0)
    resources = list(dict.fromkeys(name for reports in runs.values() for report in reports[:1] for name in report.fill))
    found = [
        Section(
            "Losses",
            "Nats per target, smoothed; the faint line is each step.",
            (
                Chart("Training loss (weighted sum)", _lines(runs, lambda r: r.loss)),
                Chart("Text loss", _lines(runs, lambda r: r.text_loss)),
                Chart("Text accuracy", _lines(runs, lambda r: r.text_accuracy, percent=True)),
            ),
        ),
        Section(
            "Codebooks",
            "Loss in nats; the dashed line is the codebook's unigram entropy, which a model that ignores the text would reach.",
            tuple(
                Chart(f"Codebook {k}" + (" (semantic)" if k == 0 else ""), _lines(runs, _at("codec_loss", k), _at("codec_entropy", k)))
                for k in range(codebooks)
            )
            + tuple(
                Chart(f"Accuracy of codebook {k}", _lines(runs, _at("codec_accuracy", k), percent=True)) for k in range(min(codebooks, 1))
            ),
        ),
        Section(
            "Optimizer",
            "",
            (
                Chart("Gradient norm before clipping", _lines(runs, lambda r: r.grad_norm, from_zero=True)),
                Chart("Learning rate", _lines(runs, lambda r: r.lr, smooth=False, from_zero=True)),
            ),
        ),
        Section(
            "Rows",
            "Demand over capacity of each resource of a row.",
            tuple(Chart(f"Fill: {name}", _lines(runs, _fill(name), percent=True)) for name in resources),
        ),
        Section(
            "Speed",
            "Over all ranks.",
            (
                Chart("Tokens per second", _lines(runs, lambda r: r.tokens_per_second, from_zero=True)),
                Chart("Seconds of audio per second", _lines(runs, lambda r: r.audio_seconds_per_second, from_zero=True)),
                Chart("Seconds per step", _lines(runs, lambda r: r.seconds, from_zero=True)),
                Chart(
                    "Waiting for data, share of the step", _lines(runs, lambda r: r.data_wait_seconds / max(r.seconds, 1e-9), percent=True)
                ),
                Chart("Memory of a rank, GiB", _lines(runs, lambda r: r.memory_bytes / 2**30, smooth=False, from_zero=True)),
            ),
        ),
    ]
    return [section for section in found if section.charts]


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about ``span`` values, without the bias of its start; gaps (NaN) stay gaps."""
    keep, total, weight, result = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if math.isfinite(value) else math.nan)
    return result


def _at(name: str, k: int) -> Callable[[StepReport], float]:
    def value(report: StepReport) -> float:
        values: tuple[float, ...] = getattr(report, name)
        return values[k] if k < len(values) else math.nan

    return value


def _fill(resource: str) -> Callable[[StepReport], float]:
    return lambda report: report.fill.get(resource, math.nan)


def _lines(
    runs: Runs,
    value: Callable[[StepReport], float],
    reference: Callable[[StepReport], float] | None = None,
    *,
    percent: bool = False,
    smooth: bool = True,
    from_zero: bool = False,
) -> go.Figure:
    figure = go.Figure()
    for number, (name, reports) in enumerate(runs.items()):
        color = PALETTE[number % len(PALETTE)]
        every = max(1, math.ceil(len(reports) / MAX_POINTS))
        steps = [report.step + 1 for report in reports][::every]
        values = [value(report) for report in reports]
        if smooth:
            figure.add_scatter(x=steps, y=values[::every], line={"color": color, "width": 1}, opacity=0.22, hoverinfo="skip")
            values = smoothed(values, max(1.0, len(values) / 40))
        figure.add_scatter(x=steps, y=values[::every], name=name, line={"color": color, "width": 2})
        if reference is not None:
            line = {"color": REFERENCE if len(runs) == 1 else color, "width": 1.5, "dash": "dash"}
            figure.add_scatter(x=steps, y=[reference(report) for report in reports][::every], name="entropy", line=line)
    figure.update_traces(mode="lines", showlegend=False)
    figure.update_layout(
        template="plotly_white",
        height=240,
        margin={"l": 48, "r": 12, "t": 8, "b": 32},
        hovermode="x unified",
        font={"family": "system-ui, sans-serif", "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"title": {"text": "step", "standoff": 4}},
        yaxis={"tickformat": ".0%" if percent else None, "rangemode": "tozero" if percent or from_zero else "normal", "automargin": True},
    )
    return figure
