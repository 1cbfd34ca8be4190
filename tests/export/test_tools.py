"""``tools/convert_checkpoint.py`` and ``tools/generate.py`` as a user calls them (in this process: imports are slow)."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs a tool; returns its exit code, its summary and its messages."""

    def run(tool: str, *arguments: object) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), json.loads(captured.out or "{}"), captured.err

    return run


def test_convert_verify_info_and_generate(trained, tmp_path: Path, call) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    code, summary, _ = call("convert_checkpoint.py", "to-hf", trained.run, out, "--codec", trained.codec)
    assert code == 0 and summary["max_abs_diff"] <= 1e-5 and summary["tensors"] > 100 and summary["bytes"] > 1000
    assert call("convert_checkpoint.py", "verify", trained.run, out)[1] == summary
    code, hashes, _ = call("convert_checkpoint.py", "verify", trained.run)
    assert code == 0 and hashes["faults"] == []
    assert call("convert_checkpoint.py", "info", trained.run)[1]["step"] == 7
    code, _, message = call("convert_checkpoint.py", "to-hf", trained.run, out, "--codec", trained.codec)
    assert code == 2 and "exists" in message

    question, answer = tmp_path / "question.wav", tmp_path / "answer.wav"
    soundfile.write(question, np.sin(np.arange(22050) / 15), 22050)
    asked = ("generate.py", "--model", out, "--audio", question, "--max-new-tokens", 4)
    code, text_only, _ = call(*asked, "--prompt", "Transcribe:")
    assert code == 0 and isinstance(text_only["text"], str) and text_only["frames"] is None
    code, spoken, _ = call(*asked, "--out-audio", answer, "--max-frames", 5)
    wave, rate = soundfile.read(answer)
    assert code == 0 and rate == 24000 and len(wave) == 1920 * spoken["frames"] and 1 <= spoken["frames"] <= 5
    sampled = [call(*asked, "--temperature", 1.5, "--seed", seed)[1]["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert call("generate.py", "--model", tmp_path / "nowhere", "--audio", question)[0] == 2
    assert call("generate.py", "--model", out, "--audio", tmp_path / "nowhere.wav")[0] == 2
