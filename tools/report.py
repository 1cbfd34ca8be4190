"""Draws one or several runs as one HTML page: curves, scores, samples to listen to."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_omni.report.page import ReportSummary, write_report
from megatron_omni.runtime import cli


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are overlaid.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first run.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="What tools/evaluate.py --report wrote.")] = None,
) -> ReportSummary:
    """Draws runs as one HTML page that needs no other file and no network."""
    return write_report(runs, out or runs[0] / "report.html", evaluation)


if __name__ == "__main__":
    cli.command(report)
