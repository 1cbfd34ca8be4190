"""Where a step's report goes: a console line, ``RUN/metrics.jsonl`` and, if wanted, wandb. Only rank 0 writes."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import orjson
import wandb

from megatron_omni.config.recipe import Recipe
from megatron_omni.runtime.files import atomic_write
from megatron_omni.runtime.logs import get_logger
from megatron_omni.runtime.run_directory import RunDirectory
from megatron_omni.schema import StepReport

__all__ = ["MetricsWriter", "StepReport"]

logger = get_logger(__name__)


class MetricsWriter:
    """Writes reports; on ranks other than 0 it does nothing.

    A run that is resumed at ``start_step`` first drops the rows of later steps from ``metrics.jsonl``: each step has one
    row, the one of the weights that live on. wandb never ends a run: after its first error it is left out.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, rank: int, start_step: int = 0) -> None:
        self._steps = recipe.train.steps
        self._file: TextIO | None = None
        self._wandb: wandb.Run | None = None
        if rank != 0:
            return
        run = RunDirectory(run_dir)
        kept = [orjson.dumps(report.to_json()) + b"\n" for report in run.reports() if report.step < start_step]
        atomic_write(run.metrics, b"".join(kept))
        self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115 - held open for the whole run
        if recipe.run.wandb.mode != "disabled":
            self._guarded(lambda: self._start_wandb(run_dir, recipe))

    def write(self, report: StepReport) -> None:
        if self._file is None:
            return
        self._file.write(orjson.dumps(report.to_json()).decode() + "\n")
        self._file.flush()
        logger.info(console_line(report, self._steps))
        if self._wandb is not None:
            run, values = self._wandb, scalars(report)
            self._guarded(lambda: run.log(values))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._guarded(self._wandb.finish)
        self._file = self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_wandb(self, run_dir: Path, recipe: Recipe) -> None:
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            atomic_write(id_file, secrets.token_hex(4))
        options = recipe.run.wandb
        self._wandb = wandb.init(
            project=options.project,
            name=options.name or run_dir.name,
            id=id_file.read_text(),
            mode="online" if options.mode == "online" else "offline",
            resume="allow",
            dir=run_dir,
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        # The step is a value of ours: wandb's own counter refuses to go back when a run resumes.
        self._wandb.define_metric("*", step_metric="step")

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service raises, training goes on
            logger.warning("wandb stopped (%s: %s); metrics.jsonl goes on", type(error).__name__, error)
            self._wandb = None


def scalars(report: StepReport) -> dict[str, float]:
    """The report as flat scalars: ``codec_loss/0``, ``fill/seq``, ``data/stall``, ..."""
    flat: dict[str, float] = {}
    for name, value in report.to_json().items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": item for key, item in value.items()}
        elif isinstance(value, list | tuple):
            flat |= {f"{name}/{k}": item for k, item in enumerate(value)}
        else:
            flat["data/stall" if name == "data_stall" else name] = value
    return flat


def console_line(report: StepReport, steps: int) -> str:
    """One line, widest news first: losses against what a model that knows nothing would reach, then speed."""
    parts = [
        f"step {report.step + 1}/{steps}",
        f"loss {report.loss:.4f}",
        f"text {report.text_loss:.3f} ({report.text_accuracy:.1%})",
    ]
    if report.codec_loss:
        parts.append(f"codec0 {report.codec_loss[0]:.3f} of {report.codec_entropy[0]:.2f}")
        mean, entropy = (_mean(values) for values in (report.codec_loss, report.codec_entropy))
        parts.append(f"codec {mean:.3f} of {entropy:.2f}")
    parts += [
        f"grad {report.grad_norm:.3g}",
        f"lr {report.lr:.2e}",
        f"{report.tokens_per_second:,.0f} tok/s",
        f"{report.audio_seconds_per_second:.1f} s audio/s",
        f"fill {max(report.fill.values(), default=0.0):.1%}",
        f"{report.seconds:.2f} s (data {report.data_stall:.0%})",
        f"{report.memory_bytes / 2**30:.2f} GiB",
    ]
    return "  ".join(parts)


def _mean(values: tuple[float, ...]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
