"""The quality gate: rules that a sample's recordings and text have to pass, each with a limit and a consequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict

from megatron_omni.runtime.errors import InputError

Action = Literal["reject", "warn", "off"]

FULL_SCALE = 0.999
"""Magnitude from which on a sample counts as clipped."""


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Action
    limit: float


class Gate(BaseModel):
    """All rules with their defaults, which keep whatever might be speech; recorded in ``dataset.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    silent: Rule = Rule(action="reject", limit=-70.0)
    """Loudest 20 ms below this level, dB of full scale (RMS)."""
    clipped: Rule = Rule(action="warn", limit=0.01)
    """Share of samples at full scale above this."""
    offset: Rule = Rule(action="warn", limit=0.1)
    """Magnitude of the mean above this; full scale is 1."""
    short: Rule = Rule(action="reject", limit=0.02)
    """Seconds below this."""
    long: Rule = Rule(action="warn", limit=1800.0)
    """Seconds above this."""
    dense: Rule = Rule(action="warn", limit=40.0)
    """More characters of the answer's text a second of its own speech, or of the recording it transcribes, than anyone speaks."""
    sparse: Rule = Rule(action="warn", limit=0.2)
    """Fewer characters a second than this."""

    def changed(self, settings: Sequence[str]) -> Gate:
        """With rules set by ``NAME=ACTION`` or ``NAME=ACTION:LIMIT``; raises ``InputError`` for anything else."""
        rules = dict(self)
        for setting in settings:
            name, _, value = setting.partition("=")
            action, _, limit = value.partition(":")
            if name not in rules or action not in get_args(Action):
                raise InputError(
                    f"gate {setting!r}: expected RULE=ACTION[:LIMIT] with a rule of {', '.join(rules)} and an action of "
                    f"{', '.join(get_args(Action))}, such as silent=warn:-50"
                )
            try:
                rules[name] = Rule(action=action, limit=float(limit) if limit else rules[name].limit)
            except ValueError as error:
                raise InputError(f"gate {setting!r}: the limit {limit!r} is no number") from error
        return Gate(**rules)

    def check_wave(self, name: str, wave: np.ndarray, rate: int) -> Iterator[tuple[str, Action, str]]:
        """Rules that a recording (float32 [W]) breaks: name, consequence, what was found."""
        seconds = wave.size / rate
        clipped = float(np.mean(np.abs(wave) >= FULL_SCALE))
        yield from self._judge("silent", _loudest(wave, rate), f"{name}: its loudest 20 ms have {{value:.1f}} dB", below=True)
        yield from self._judge("clipped", clipped, f"{name}: {{value:.2%}} of its samples are at full scale")
        yield from self._judge("offset", abs(float(wave.mean(dtype=np.float64))), f"{name}: its mean is {{value:.3f}} of full scale")
        yield from self._judge("short", seconds, f"{name}: is {{value:.3f}} s long", below=True)
        yield from self._judge("long", seconds, f"{name}: is {{value:.1f}} s long")

    def check_text(self, text: str, seconds: float) -> Iterator[tuple[str, Action, str]]:
        """Rules that a text with its recording breaks."""
        rate = len(text) / max(seconds, 1e-9)
        yield from self._judge("dense", rate, f"{len(text)} characters in {seconds:.2f} s are {{value:.1f}} a second")
        yield from self._judge("sparse", rate, f"{len(text)} characters in {seconds:.2f} s are {{value:.2f}} a second", below=True)

    def _judge(self, name: str, value: float, what: str, below: bool = False) -> Iterator[tuple[str, Action, str]]:
        rule: Rule = getattr(self, name)
        if rule.action != "off" and (value < rule.limit if below else value > rule.limit):
            bound = "at least" if below else "at most"
            yield name, rule.action, f"{what.format(value=value)}, expected {bound} {rule.limit:g} (gate rule {name!r})"


def _loudest(wave: np.ndarray, rate: int) -> float:
    """dB of the loudest 20 ms; a recording of noise floor with one click is loud, a quiet voice is not silent."""
    width = min(wave.size, max(1, rate // 50))
    power = np.square(wave[: wave.size // width * width].reshape(-1, width), dtype=np.float64).mean(1).max()
    return 10.0 * float(np.log10(max(power, 1e-20)))
