"""One self-contained HTML page about one or several runs: curves, scores, samples to listen to."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import orjson
from plotly.offline import get_plotlyjs
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_omni.report.curves import PALETTE, Chart, sections
from megatron_omni.runtime.errors import InputError
from megatron_omni.runtime.files import atomic_write
from megatron_omni.runtime.run_directory import RunDirectory
from megatron_omni.schema import StepReport

CODEC_COLUMNS = {"loss": "loss", "entropy": "entropy", "accuracy": "accuracy", "loss_swapped_text": "texts swapped"}
MAX_WRONG = 40
"""Wrong answers that the page lists."""
SCORE_COLUMNS = {"samples": "samples", "wer": "WER", "cer": "CER", "exact_match": "exact match"}


class Heard(BaseModel):
    """A held-out sample of an evaluation; audio paths are relative to the evaluation's file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    task: str
    reference: str | None = ""
    hypothesis: str = ""
    input_wav: Path | None = None
    target_wav: Path | None = None
    generated_wav: Path | None = None


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: bool = True
    """All columns but the first hold numbers."""


@dataclass(frozen=True)
class Player:
    name: str
    uri: str


@dataclass(frozen=True)
class Card:
    """A sample as the page shows it."""

    sample: Heard
    players: tuple[Player, ...]


@dataclass(frozen=True)
class ReportSummary:
    report: str
    runs: int
    steps: int
    samples: int
    bytes: int


def write_report(runs: Sequence[Path], out: Path, evaluation: Path | None = None) -> ReportSummary:
    """Writes ``out``; ``evaluation`` is the JSON that ``tools/evaluate.py --report`` wrote.

    Raises ``InputError`` for a run without metrics, two runs of one name, and audio that the evaluation names and is not there.
    """
    reports = dict(_read(runs))
    tables, cards = _evaluation(evaluation) if evaluation else ([], [])
    charts = [
        (section, [(chart.title, _html(chart, f"chart-{i}-{j}")) for j, chart in enumerate(section.charts)])
        for i, section in enumerate(sections(reports))
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        title=" · ".join(reports),
        plotly=get_plotlyjs(),
        legend=[(name, PALETTE[number % len(PALETTE)]) for number, name in enumerate(reports)],
        tiles=_tiles(next(iter(reports.values()))) if len(reports) == 1 else [],
        tables=tables,
        sections=charts,
        cards=cards,
        configs=[(run.name, RunDirectory(run).config.read_text()) for run in runs if RunDirectory(run).config.exists()],
    )
    atomic_write(out, page)
    return ReportSummary(str(out), len(reports), sum(map(len, reports.values())), len(cards), out.stat().st_size)


def _html(chart: Chart, name: str) -> str:
    html: str = chart.figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False, "displayModeBar": False, "responsive": True}
    )
    return html


def _read(runs: Sequence[Path]) -> Iterator[tuple[str, list[StepReport]]]:
    names = [run.resolve().name for run in runs]
    for run in runs:
        reports = list(RunDirectory(run).reports())
        if not reports:
            raise InputError(f"{RunDirectory(run).metrics} holds no steps; expected a run directory that training wrote to")
        name = run.resolve().name
        yield (name if names.count(name) == 1 else str(run)), reports


def _tiles(reports: Sequence[StepReport]) -> list[Tile]:
    last = reports[-max(1, len(reports) // 20) :]  # the last twentieth: single steps are noisy

    def mean(values: Iterator[float]) -> float:
        return sum(values) / len(last)

    tiles = [
        Tile("steps", f"{reports[-1].step + 1:,}", f"{sum(r.seconds for r in reports) / 60:,.1f} minutes of logged steps"),
        Tile("text loss", f"{mean(r.text_loss for r in last):.3f}", f"accuracy {mean(r.text_accuracy for r in last):.1%}"),
    ]
    if last[-1].codec_loss:
        tiles.append(
            Tile("codebook 0 loss", f"{mean(r.codec_loss[0] for r in last):.2f}", f"unigram entropy {last[-1].codec_entropy[0]:.2f}")
        )
    tiles += [
        Tile(
            "tokens/s",
            f"{mean(r.tokens_per_second for r in last):,.0f}",
            f"{mean(r.audio_seconds_per_second for r in last):,.1f} s of audio per second",
        ),
        Tile("fill", f"{mean(max(r.fill.values(), default=0.0) for r in last):.1%}", "of the scarcest resource"),
    ]
    return tiles


# --------------------------------------------------------------------------- evaluation


def _evaluation(path: Path) -> tuple[list[Table], list[Card]]:
    try:
        data = orjson.loads(path.read_bytes())
        samples = [Heard.model_validate(sample) for sample in data.get("samples", [])]
    except (OSError, orjson.JSONDecodeError, AttributeError, ValidationError) as error:
        raise InputError(f"{path} is not an evaluation: {error}; expected the file that tools/evaluate.py --report writes") from error
    tables = []
    tasks = {name: scores for name, scores in data.items() if isinstance(scores, dict) and "exact_match" in scores}
    if tasks:
        tables.append(Table("Held-out scores", ("task", *SCORE_COLUMNS.values()), tuple(_score_rows(tasks))))
    if codec := data.get("codec"):
        columns = [key for key in CODEC_COLUMNS if codec.get(key)]
        rows = tuple((str(k), *(_score(codec[key][k], key) for key in columns)) for k in range(len(codec["loss"])))
        title = "Held-out codec loss, nats; with the texts of the samples swapped it must rise"
        tables.append(Table(title, ("codebook", *(CODEC_COLUMNS[key] for key in columns)), rows))
    wrong = [one for one in samples if one.reference and one.reference.casefold().strip() != one.hypothesis.casefold().strip()]
    if wrong:
        rows = tuple((one.id, one.task, one.reference or "", one.hypothesis) for one in wrong[:MAX_WRONG])
        shown = f"; the first {MAX_WRONG}" if len(wrong) > MAX_WRONG else ""
        title = f"Answers that differ from the reference: {len(wrong):,} of {len(samples):,}{shown}"
        tables.append(Table(title, ("id", "task", "reference", "generated"), rows, numbers=False))
    audible = [one for one in samples if one.input_wav or one.target_wav or one.generated_wav]
    return tables, [Card(one, tuple(_players(one, path))) for one in audible]


def _score_rows(tasks: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row per task, and below it one per value of each attribute that was scored apart."""
    for task, scores in tasks.items():
        yield (task, *(_score(scores.get(key), key) for key in SCORE_COLUMNS))
        for attribute, values in scores.get("by", {}).items():
            for value, part in values.items():
                yield (f"{task}, {attribute} {value}", *(_score(part.get(key), key) for key in SCORE_COLUMNS))


def _score(value: Any, key: str) -> str:
    if value is None:
        return "-"
    if key in ("wer", "cer", "exact_match", "accuracy"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _players(sample: Heard, evaluation: Path) -> Iterator[Player]:
    for name, file in (("input", sample.input_wav), ("target", sample.target_wav), ("generated", sample.generated_wav)):
        if file is None:
            continue
        try:
            content = (evaluation.parent / file).read_bytes()
        except OSError as error:
            raise InputError(f"{evaluation}: sample {sample.id}: {name} audio {file} cannot be read: {error}") from error
        kind = mimetypes.guess_type(file.name)[0] or "audio/wav"
        yield Player(name, f"data:{kind};base64,{base64.b64encode(content).decode()}")
