"""The frame of every command-line tool: parsing, ``--json``, the closing summary, progress and exit codes.

A tool is one typed function that returns its summary::

    def make(manifest: Annotated[Path, typer.Option(help="JSON lines")], out: Annotated[Path, typer.Option()]) -> Summary: ...

    if __name__ == "__main__":
        cli.command(make)

Standard output carries the summary and nothing else; progress and messages go to standard error.
Exit codes: 0 done, 1 the work failed, 2 the input is wrong.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, TypeVar, get_type_hints

import orjson
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from megatron_omni.runtime.errors import OmniError
from megatron_omni.runtime.world import World

Item = TypeVar("Item")


def command(*functions: Callable[..., Any]) -> None:
    """Runs ``functions`` as the process's command line and exits; several functions become subcommands.

    Each is annotated for typer and returns a pydantic model, a dataclass or a dict, its summary, or None. ``--json`` is
    added to each: one JSON object instead of a table. A summary whose ``faults`` is not empty exits with 1.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=len(functions) > 1)
    for function in functions:
        app.command()(_framed(function))
    app()


def progress(items: Iterable[Item], description: str, total: float | None = None) -> Iterable[Item]:
    """``items``, with a progress bar on standard error if that is a terminal."""
    console = Console(stderr=True)
    return track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)


class Meter:
    """A progress bar with a count, the time left and a note."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def note(self, text: str) -> None:
        self._bar.update(self._task, note=text)


@contextmanager
def meter(description: str, total: int) -> Iterator[Meter]:
    """A ``Meter`` on standard error if that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Meter(bar, bar.add_task(description, total=total, note=""))


def to_dict(summary: object) -> dict[str, Any]:
    """The summary as plain JSON values."""
    plain = summary.model_dump(mode="json") if isinstance(summary, BaseModel) else summary
    data: dict[str, Any] = orjson.loads(orjson.dumps(plain, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))
    return data


def _framed(function: Callable[..., Any]) -> Callable[..., None]:
    """``function`` with ``--json`` added to its signature, its summary printed and its errors turned into exit codes."""

    @functools.wraps(function)
    def framed(*args: Any, as_json: bool = False, **named: Any) -> None:
        try:
            with _nothing_on_stdout():
                summary = function(*args, **named)
        except OmniError as error:
            world = World.from_environment()
            where = f"error (rank {world.rank})" if world.size > 1 else "error"
            Console(stderr=True).print(f"{where}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from error
        data = {} if summary is None else to_dict(summary)
        if as_json:
            sys.stdout.write(orjson.dumps(data).decode() + "\n")
        elif data:
            Console().print(_table(data))
        if data.get("faults"):
            raise typer.Exit(1)

    hints = get_type_hints(function, include_extras=True)
    option = inspect.Parameter(
        "as_json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")],
    )
    parameters = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
    framed.__signature__ = inspect.Signature([*parameters, option], return_annotation=None)  # type: ignore[attr-defined]
    framed.__annotations__ = {p.name: p.annotation for p in [*parameters, option]} | {"return": None}
    return framed


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Whatever libraries and child processes print goes to standard error, so that standard output holds the summary alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ("\n" if any(isinstance(item, str | dict) for item in value) else " ").join(map(_cell, value)) or "none"
    return str(value)


def _table(data: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _flat(data):
        table.add_row(key, _cell(value))
    return table
