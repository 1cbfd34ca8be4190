"""Packed rows for people: which samples lie where, what the model reads, where the loss falls, what is left empty."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.render import render
from megatron_omni.data.rows.demands import Samples
from megatron_omni.data.rows.plan import RESOURCES, Plan, capacity
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.schema import Rendered, RowShape, Sample

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")


@dataclass(frozen=True)
class Piece:
    """A run of positions that are alike."""

    text: str
    """As the tokenizer decodes it; of audio its name and length."""
    loss: bool
    audio: bool


@dataclass(frozen=True)
class Segment:
    """One sample in its row."""

    id: str
    task: str
    start: int
    demand: tuple[int, ...]
    """In the order of ``plan.RESOURCES``."""
    supervised: int
    frames: dict[str, int]
    """Codec frames by name."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ShownRow:
    window: int
    row: int
    shape: RowShape
    segments: tuple[Segment, ...]

    @property
    def fill(self) -> dict[str, float]:
        """Demand over capacity by resource, 0 to 1."""
        used = np.sum([segment.demand for segment in self.segments], 0)
        return dict(zip(RESOURCES, (used / capacity(self.shape)).tolist(), strict=True))


def show_rows(
    samples: Samples, plan: Plan, tokenizer: OmniTokenizer, geometry: EncoderGeometry, window: int, rows: range
) -> list[ShownRow]:
    """Rows ``rows`` of a window, as far as it has them; no audio is read."""
    planned = plan.window(window)
    shown = []
    for row in itertools.takewhile(lambda row: row < len(planned), rows):
        segments, start = [], 0
        for number in planned[row].tolist():
            sample = samples.sample(number)
            rendered = render(sample, tokenizer, geometry)
            segments.append(_segment(sample, rendered, start, plan.demands[number].tolist(), tokenizer))
            start += len(rendered.token_ids)
        shown.append(ShownRow(window, row, plan.shape, tuple(segments)))
    return shown


def _segment(sample: Sample, rendered: Rendered, start: int, demand: Sequence[int], tokenizer: OmniTokenizer) -> Segment:
    clips = {span.start: span for span in rendered.audio}
    pieces, place = [], 0
    while place < len(rendered.token_ids):
        if place in clips and clips[place].length:
            span = clips[place]
            seconds = sample.num_samples[span.name] / 16_000
            pieces.append(Piece(f"{span.name} {seconds:.2f} s, {span.length} positions", loss=False, audio=True))
            place += span.length
            continue
        loss = bool(rendered.loss_mask[place])
        stop = place + 1
        while stop < len(rendered.token_ids) and stop not in clips and bool(rendered.loss_mask[stop]) == loss:
            stop += 1
        pieces.append(Piece(str(tokenizer.hf.decode(rendered.token_ids[place:stop].tolist())), loss, audio=False))
        place = stop
    supervised = int(rendered.loss_mask.sum())
    return Segment(sample.id, sample.task, start, tuple(demand), supervised, dict(sample.num_frames), tuple(pieces))


def drawn_on_terminal(rows: Iterable[ShownRow], width: int = 72) -> RenderableType:
    """A bar per row, a stretch per sample; then its samples: targets are green, audio blue."""
    parts: list[RenderableType] = []
    for row in rows:
        bar = Text()
        cells = 0
        for number, segment in enumerate(row.segments):
            stop = round((segment.start + segment.demand[0]) / row.shape.seq * width)
            bar.append("█" * (stop - cells), style=_COLOURS[number % len(_COLOURS)])
            cells = max(cells, stop)
        bar.append("░" * (width - cells), style="dim")
        fill = "  ".join(f"{name} {share:.1%}" for name, share in row.fill.items())
        parts += [Text(f"window {row.window}, row {row.row}: {len(row.segments)} samples; {fill}", style="bold"), bar]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("at", "sample", "task", "targets", "codec frames"):
            table.add_column(heading, no_wrap=True)
        table.add_column("what the model reads", overflow="fold")
        for segment in row.segments:
            text = Text()
            for piece in segment.pieces:
                style = "blue" if piece.audio else "green" if piece.loss else ""
                text.append(f"[{piece.text}]" if piece.audio else piece.text, style=style)
            frames = " ".join(f"{name} {count}" for name, count in segment.frames.items())
            table.add_row(str(segment.start), segment.id, segment.task, str(segment.supervised), frames or "-", text)
        parts += [table, Text()]
    return Group(*parts)


def drawn_as_html(rows: Sequence[ShownRow]) -> str:
    """One page that needs nothing else: a bar per row and resource, and the text of each sample."""
    body = "".join(_row_as_html(row) for row in rows)
    return f"""<!doctype html><meta charset="utf-8"><title>Packed rows</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
.bar {{ display: flex; height: 1.2em; background: repeating-linear-gradient(45deg, #ddd 0 4px, #fff 4px 8px) }}
.bar i {{ display: block; border-right: 1px solid #fff; box-sizing: border-box }}
td {{ vertical-align: top; padding: .2em .8em .2em 0 }} .loss {{ background: #c8e6c9 }} .audio {{ background: #bbdefb }}
th {{ text-align: left; padding-right: .8em }} .fill td:nth-child(3) {{ width: 75% }}
</style><h1>Packed rows</h1><p>One stretch is one sample; hatched is waste. <span class="loss">Targets of the text loss</span>,
<span class="audio">audio positions</span>.</p>{body}"""


def _row_as_html(row: ShownRow) -> str:
    bars = ""
    for number, (name, share) in enumerate(row.fill.items()):
        room = capacity(row.shape)[number]
        stretches = "".join(
            f'<i title="{html.escape(segment.id)}: {segment.demand[number]}" '
            f'style="width: {100 * segment.demand[number] / room:.3f}%; background: {_COLOURS[place % len(_COLOURS)]}"></i>'
            for place, segment in enumerate(row.segments)
        )
        bars += f'<tr><td>{name}</td><td>{share:.1%} of {room}</td><td><div class="bar">{stretches}</div></td></tr>'
    lines = ""
    for segment in row.segments:
        kinds = ("audio" if piece.audio else "loss" if piece.loss else "plain" for piece in segment.pieces)
        text = "".join(f'<span class="{kind}">{html.escape(piece.text)}</span>' for kind, piece in zip(kinds, segment.pieces, strict=True))
        frames = ", ".join(f"{name} {count}" for name, count in segment.frames.items()) or "none"
        cells = (str(segment.start), html.escape(segment.id), segment.task, str(segment.supervised), html.escape(frames), text)
        lines += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return (
        f'<h2>Window {row.window}, row {row.row}: {len(row.segments)} samples</h2><table class="fill" width="100%">{bars}</table>'
        f"<table><tr><th>at<th>sample<th>task<th>targets<th>codec frames<th>what the model reads</tr>{lines}</table>"
    )
