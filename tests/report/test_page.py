"""The report page: complete in itself, safe with any text, and clear about what it cannot read."""

import math
from pathlib import Path

import numpy as np
import orjson
import pytest
import soundfile

from megatron_omni.report.curves import MAX_POINTS, sections, smoothed
from megatron_omni.report.page import write_report
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import StepReport


def report(step: int, codebooks: int = 8) -> StepReport:
    codec = tuple(5.0 - k / 10 - step / 1000 for k in range(codebooks))
    return StepReport(
        step=step,
        loss=10.0 / (1 + step / 20) + math.sin(step) / 5,
        text_loss=3.0 / (1 + step / 20),
        text_accuracy=min(1.0, step / 200),
        codec_loss=codec,
        codec_accuracy=(0.1,) * codebooks,
        codec_entropy=(5.3,) * codebooks,
        grad_norm=1.0,
        lr=1e-3,
        tokens_per_second=4000.0,
        audio_seconds_per_second=60.0,
        fill={"seq": 0.97, "codec": 0.8, "encoder": 0.6},
        seconds=0.4,
        data_wait_seconds=0.01,
        memory_bytes=2**30,
    )


def make_run(folder: Path, steps: int = 50, codebooks: int = 8) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(report(step, codebooks).to_json()) + b"\n" for step in range(steps)))
    (folder / "config.yaml").write_text("run: {dir: here}\n")
    return folder


def make_evaluation(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "heard.wav", np.zeros(1600), 16000)
    sample = {"id": "a", "task": "answer", "reference": "<b>three</b> & five", "hypothesis": "three five", "input_wav": "heard.wav"}
    data = {
        "transcribe": {"wer": 0.051, "cer": 0.02, "exact_match": 0.8, "samples": 1000, "by": {"kind": {"digits": {"wer": 0.042}}}},
        "codec": {"loss": [2.9, 4.0], "entropy": [5.36, 5.0], "accuracy": [0.3, 0.1], "loss_swapped_text": [4.14, 4.2]},
        "samples": [sample | changes, {"id": "quiet", "task": "answer", "reference": "Seven", "hypothesis": "seven"}],
    }
    (folder / "eval.json").write_bytes(orjson.dumps(data))
    return folder / "eval.json"


def test_page_holds_everything(tmp_path):
    summary = write_report([make_run(tmp_path / "run")], tmp_path / "out" / "report.html", make_evaluation(tmp_path / "eval"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert summary.steps == 50
    assert summary.samples == 1
    body = page.split("</script>", 1)[1]  # after plotly itself
    for text in ("Codebook 7", "5.1%", "transcribe, kind digits", "4.2%", "1 of 2", "4.140", "Fill: encoder", "data:audio/", "config.yaml"):
        assert text in body, text
    assert "src=&#34;" not in body
    assert "http://" not in body
    assert "https://" not in body


def test_texts_cannot_become_markup(tmp_path):
    write_report([make_run(tmp_path / "run")], tmp_path / "report.html", make_evaluation(tmp_path / "eval"))
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;three&lt;/b&gt; &amp; five" in page
    assert "<b>three</b>" not in page


def test_same_run_same_page(tmp_path):
    run = make_run(tmp_path / "run")
    write_report([run], tmp_path / "one.html")
    write_report([run], tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_runs_are_overlaid_and_named_apart(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", steps=20), make_run(tmp_path / "other")]
    assert write_report(runs, tmp_path / "report.html").runs == 3
    page = (tmp_path / "report.html").read_text()
    for name in (str(runs[0]), str(runs[1]), "other"):
        assert f"</i>{name}" in page


def test_long_runs_are_thinned_and_text_only_runs_have_no_codebooks():
    long = sections({"long": [report(step, codebooks=0) for step in range(3 * MAX_POINTS + 1)]})
    assert all(len(trace.x) <= MAX_POINTS for section in long for chart in section.charts for trace in chart.figure.data)
    assert "Codebooks" not in [section.title for section in long]


def test_smoothing_starts_unbiased_and_keeps_gaps():
    assert smoothed([4.0, 4.0, math.nan, 4.0], 10)[0] == pytest.approx(4.0)
    assert math.isnan(smoothed([4.0, math.nan, 4.0], 10)[1])
    assert smoothed([0.0, 1.0], 1) == [0.0, 1.0]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no steps"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"sample a: target audio away.wav"):
        write_report([run], tmp_path / "report.html", make_evaluation(tmp_path / "eval", target_wav="away.wav"))
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(InputError, match="is not an evaluation"):
        write_report([run], tmp_path / "report.html", tmp_path / "eval.json")
    assert not (tmp_path / "report.html").exists()
