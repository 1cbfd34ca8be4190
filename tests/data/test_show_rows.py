"""What is drawn of a row is what the row holds."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from megatron_omni.data.render import render
from megatron_omni.data.rows.demands import measure_one
from megatron_omni.data.rows.plan import RowPlan
from megatron_omni.data.rows.show import ShownRow, drawn_as_html, drawn_on_terminal, show_rows
from megatron_omni.schema import RowShape

SHAPE = RowShape(seq=160, codec=96, encoder=320, spoken=64, supervised=128)


@pytest.fixture(scope="module")
def shown(memory_samples, tokenizer, geometry) -> tuple[object, RowPlan, list[ShownRow]]:
    samples = memory_samples(40)
    table = np.array([measure_one(samples.sample(number), tokenizer, geometry, 0) for number in range(40)], np.int32)
    plan = RowPlan(table, SHAPE, seed=0)
    return samples, plan, show_rows(samples, plan, tokenizer, geometry, 0, range(1, 100))


def test_segments_are_those_of_the_row(shown, tokenizer, geometry) -> None:
    samples, plan, rows = shown
    planned = plan.window(0)
    assert [row.row for row in rows] == list(range(1, len(planned)))
    for row, numbers in zip(rows, planned[1:], strict=True):
        assert [segment.id for segment in row.segments] == [f"s{number}" for number in numbers]
        assert row.fill["seq"] == pytest.approx(plan.demands[numbers, 0].sum() / SHAPE.seq)
        start = 0
        for segment, number in zip(row.segments, numbers.tolist(), strict=True):
            sample = samples.sample(number)
            rendered = render(sample, tokenizer, geometry)
            assert segment.start == start
            assert segment.frames == sample.num_frames
            assert segment.supervised == int(rendered.loss_mask.sum())
            said = [
                part.value for message in sample.messages if message.role == "assistant" for part in message.content if part.type == "text"
            ]
            targets = "".join(piece.text for piece in segment.pieces if piece.loss)
            assert all(text in targets for text in said)
            assert sum(piece.audio for piece in segment.pieces) == len(sample.num_samples)
            start += len(rendered.token_ids)


def test_drawings_show_text_audio_and_waste_and_escape(shown) -> None:
    _, _, rows = shown
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(drawn_on_terminal(rows[:2]))
    drawn = console.export_text()
    assert "window 0, row 1" in drawn and rows[0].segments[0].id in drawn and "░" in drawn
    first = rows[0].segments[0]
    evil = dataclasses.replace(first, id="<script>alert(1)</script>")
    page = drawn_as_html([dataclasses.replace(rows[0], segments=(evil, *rows[0].segments[1:]))])
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("<h2>") == 1 and 'class="loss"' in page and 'class="audio"' in page
