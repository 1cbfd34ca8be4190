"""Draws packed rows: samples, text, where the loss falls, codec frames, waste; on the terminal or as an HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_omni.config.load import load_recipe
from megatron_omni.data.rows.pack import RowSettings, open_rows
from megatron_omni.data.rows.show import ShownRow, drawn_as_html, drawn_on_terminal, show_rows
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.runtime import cli
from megatron_omni.runtime.files import atomic_write


@dataclass(frozen=True)
class Shown:
    windows_per_epoch: int
    samples: int
    """In the rows that were drawn."""
    fill: list[float]
    """Of the positions of each row."""


def main(
    config: Annotated[Path, typer.Option(help="recipe of the run; its data.plan is read where it has one")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes to the recipe")] = None,
    window: Annotated[int, typer.Option(min=0, help="the window, counted across epochs")] = 0,
    first: Annotated[int, typer.Option(min=0, help="the first row of the window to draw")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="how many rows")] = 1,
    html: Annotated[Path | None, typer.Option(help="write a page to this file instead of drawing on the terminal")] = None,
) -> Shown:
    """Shows rows as training gets them."""
    recipe = load_recipe(config, overrides or [])
    tokenizer, settings = OmniTokenizer.load(recipe.data.tokenizer), RowSettings.of(recipe)
    source = open_rows(recipe.data.train, tokenizer, settings, recipe.data.plan)
    shown: list[ShownRow] = show_rows(source.samples, source.plan, tokenizer, settings.geometry, window, range(first, first + rows))
    if html is not None:
        atomic_write(html, drawn_as_html(shown))
    else:
        Console(stderr=True).print(drawn_on_terminal(shown))
    return Shown(source.plan.windows_per_epoch, sum(len(row.segments) for row in shown), [row.fill["seq"] for row in shown])


if __name__ == "__main__":
    cli.command(main)
