"""How full rows get, how alike they cost and how fast they are planned: ours, first-fit, and a loader that packs from a buffer.

The buffered loader is as VeOmni's (``veomni/data/batching_strategy.py``): from the oldest of at least 500 waiting samples on,
every sample that still fits joins the row. Both it and first-fit are held to all capacities of a row here, as rows of
static shape demand; they take the samples in the order of our plan's permutation.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer
from common import in_turns, write_result
from rich.console import Console
from rich.table import Table

from megatron_omni.audio.geometry import EncoderGeometry
from megatron_omni.data.rows.plan import Fill, RowPlan, capacity
from megatron_omni.runtime import cli
from megatron_omni.schema import RowShape

SEQ = 8192
BUFFER = 500
GEOMETRY = EncoderGeometry(hop_length=160, conv_strides=(1, 2), stack=4)  # Whisper's, 12.5 embeddings/s
TEMPLATE = 9  # tokens around an audio and its transcript

Rows = list[np.ndarray]


def transcribed(seconds: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """int64 [n, 5]: transcription of clips of these lengths, with about 3.3 tokens per second of speech."""
    waves = (16_000 * seconds).astype(int)
    text = np.maximum(1, seconds * random.normal(3.3, 0.6, len(seconds))).astype(int)
    embeddings, slots = np.array([(GEOMETRY.num_audio_embeddings(n), GEOMETRY.slot(n)) for n in waves.tolist()]).T
    nothing = np.zeros_like(text)
    return np.stack([embeddings + text + TEMPLATE, nothing, slots, nothing, text + 1], 1)


def answered(seconds: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """int64 [n, 5]: a spoken question and a spoken answer that share these lengths unevenly."""
    share = random.uniform(0.2, 0.8, len(seconds))
    demands, spoken = transcribed(seconds * share, random), transcribed(seconds * (1 - share), random)
    text, frames = spoken[:, 4], np.ceil(seconds * (1 - share) * 12.5).astype(int)
    demands[:, 0] += text - demands[:, 4]
    demands[:, 1], demands[:, 3], demands[:, 4] = text + frames, text, text
    return demands


def lengths(count: int) -> dict[str, np.ndarray]:
    """int64 [count, 5] by name."""
    random = np.random.default_rng(0)
    read, dialogue = transcribed(random.uniform(2, 16, count), random), answered(random.uniform(5, 60, count), random)
    either = random.random(count) < 0.5
    return {
        "read speech, 2-16 s": read,
        "commands, 0.5-3 s": transcribed(random.uniform(0.5, 3, count), random),
        "dialogue, 5-60 s": dialogue,
        "read speech and dialogue": np.where(either[:, None], read, dialogue),
    }


def shape_for(demands: np.ndarray, room: float) -> RowShape:
    """SEQ positions, and of all else ``room`` times what goes with them on average."""
    wanted = np.maximum(np.ceil(room * SEQ * demands.sum(0) / demands[:, 0].sum()).astype(int), demands.max(0)).tolist()
    return RowShape(SEQ, max(wanted[1], 1), -(-wanted[2] // 4) * 4, max(wanted[3], 1), -(-wanted[4] // 128) * 128)


def first_fit(demands: np.ndarray, order: np.ndarray, limits: np.ndarray) -> Rows:
    """Each sample into the first row that holds it."""
    free = np.empty((64, len(limits)), np.int64)
    rows: list[list[int]] = []
    for sample in order.tolist():
        fits = (free[: len(rows)] >= demands[sample]).all(1)
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            if row == len(free):
                free = np.concatenate([free, np.empty_like(free)])
            free[row] = limits
            rows.append([])
        free[row] -= demands[sample]
        rows[row].append(sample)
    return [np.array(row) for row in rows]


def buffered(demands: np.ndarray, order: np.ndarray, limits: np.ndarray) -> Rows:
    """Rows from a buffer of the ``BUFFER`` oldest samples, each row greedily in their order."""
    needs, waiting, rows = demands.tolist(), order[:BUFFER].tolist(), []
    arriving = iter(order[BUFFER:].tolist())
    room_at_first = limits.tolist()
    while waiting:
        room, row, left = list(room_at_first), [], []
        for sample in waiting:
            need = needs[sample]
            if all(wanted <= free for wanted, free in zip(need, room, strict=True)):
                room = [free - wanted for wanted, free in zip(need, room, strict=True)]
                row.append(sample)
            else:
                left.append(sample)
        rows.append(np.array(row))
        waiting = left + list(itertools.islice(arriving, len(row)))
    return rows


def spread(demands: np.ndarray, rows: Rows, shape: RowShape) -> float:
    """Standard deviation over mean of the rows' attention cost: squared loads of LLM, codec decoder and encoder, summed."""
    cost = ((demands / capacity(shape))[:, :3] ** 2).sum(1)
    costs = np.array([cost[row].sum() for row in rows])
    return float(costs.std() / costs.mean())


def main(
    samples: Annotated[int, typer.Option(min=1000, help="of each kind")] = 60_000,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> dict[str, object]:
    """Plans an epoch of each kind of data, with ample and with tight room beside the positions."""
    table = Table("data", "room", "planner", "rows", "fill", "cost spread", "samples/s")
    cases = []
    for name, demands in lengths(samples).items():
        for room in (1.25, 1.02):
            shape = shape_for(demands, room)
            plan = RowPlan(demands.astype(np.int32), shape, seed=0)
            windows = range(plan.windows_per_epoch)
            order = np.random.default_rng(1).permutation(samples)
            planners: dict[str, Callable[[], Rows]] = {
                "ours": lambda plan=plan, windows=windows: [row for window in windows for row in plan.window(window)],  # type: ignore[misc]
                "first-fit": lambda d=demands, o=order, s=shape: first_fit(d, o, capacity(s)),  # type: ignore[misc]
                "buffer of 500": lambda d=demands, o=order, s=shape: buffered(d, o, capacity(s)),  # type: ignore[misc]
            }
            made = {planner: function() for planner, function in planners.items()}
            seconds = in_turns({"ours": planners["ours"]}, rounds) | in_turns({k: v for k, v in planners.items() if k != "ours"}, 1)
            case: dict[str, object] = {"data": name, "room": room, "shape": dataclasses.asdict(shape), "windows": len(windows)}
            for planner, rows in made.items():
                assert sorted(np.concatenate(rows).tolist()) == list(range(samples))
                assert all((demands[row].sum(0) <= capacity(shape)).all() for row in rows)
                fill = Fill.of(demands.sum(0), shape, len(rows))
                speed = samples / statistics.median(seconds[planner])
                result = {"rows": len(rows), "fill": dataclasses.asdict(fill), "cost_spread": spread(demands, rows, shape)}
                case[planner] = result | {"samples_per_second": speed}
                cells = (str(len(rows)), f"{fill.binding:.2%}", f"{result['cost_spread']:.3f}", f"{speed:,.0f}")
                table.add_row(name, str(room), planner, *cells)
            cases.append(case)
    Console(stderr=True).print(table)
    ours = [case["ours"] for case in cases]
    summary = {
        "samples": samples,
        "rounds": rounds,
        "lowest_fill": min(result["fill"]["binding"] for result in ours),  # type: ignore[index]
        "lowest_samples_per_second": min(result["samples_per_second"] for result in ours),  # type: ignore[index]
    }
    write_result("plan_rows", summary | {"cases": cases}, packages=("numpy",))
    return summary


if __name__ == "__main__":
    cli.command(main)
