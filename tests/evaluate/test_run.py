"""The whole evaluation: generated text, groups, recordings, refusals, and the tool on an exported folder and real shards."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import jiwer
import numpy as np
import orjson
import pytest
import soundfile

from megatron_omni.audio.codec import Mimi
from megatron_omni.config.model import CodecConfig
from megatron_omni.data.building.builder import build_shards
from megatron_omni.data.tokenizer import OmniTokenizer
from megatron_omni.evaluate import run
from megatron_omni.evaluate.answers import chat, generate_texts
from megatron_omni.evaluate.run import Answer, Evaluation, evaluate, evaluate_samples, spread
from megatron_omni.evaluate.samples import Selection, answer
from megatron_omni.export.modeling import OmniForConditionalGeneration
from megatron_omni.export.processing import OmniProcessor
from megatron_omni.runtime.errors import InputError
from tests.evaluate.tiny import WORDS, K, MemorySamples, make_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def evaluated(
    model: OmniForConditionalGeneration, processor: OmniProcessor, tokenizer: OmniTokenizer, samples: MemorySamples, folder: Path
) -> tuple[Evaluation, list[Answer]]:
    return evaluate_samples(model, processor, tokenizer, samples, 7, ["kind", "unknown"], folder / "speech", 3)


def test_texts_do_not_depend_on_the_batch(model: OmniForConditionalGeneration, processor: OmniProcessor, samples: MemorySamples) -> None:
    alone = []
    for number in range(len(samples)):
        ids = model.generate(**processor(chat(samples, number)), max_new_tokens=6, do_sample=False)
        alone.append(processor.decode(ids[0]))
    assert generate_texts(model, processor, samples, 7, 6) == alone
    assert len(set(alone)) > 1


def test_text_scores_by_task_and_attribute(evaluated: tuple[Evaluation, list[Answer]], samples: MemorySamples) -> None:
    evaluation, answers = evaluated
    assert [one.id for one in answers] == [sample.id for sample in samples.samples]
    assert [one.reference for one in answers] == [answer(sample) or "" for sample in samples.samples]
    assert list(evaluation.tasks) == ["answer", "converse", "speech_to_speech", "transcribe"]
    assert all(scores.samples == 6 for scores in evaluation.tasks.values())
    codes_alone = evaluation.tasks["speech_to_speech"]
    assert (codes_alone.wer, codes_alone.exact_match, codes_alone.by) == (None, None, {"kind": {}, "unknown": {}})
    transcribe = evaluation.tasks["transcribe"]
    assert transcribe.codec is None
    assert transcribe.by["unknown"] == {}
    even = [one for one in answers if one.task == "transcribe" and one.attributes["kind"] == "even"]
    assert transcribe.by["kind"]["even"].samples == len(even) == 3
    said = [run.score([one.reference], [one.hypothesis]) for one in even]
    words = [len(one.reference.split()) for one in even]
    pooled = sum(one.wer * count for one, count in zip(said, words, strict=True) if one.wer is not None) / sum(words)
    assert transcribe.by["kind"]["even"].wer == pytest.approx(pooled)


def test_right_answers_score_right(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    tokenizer: OmniTokenizer,
    samples: MemorySamples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def say_the_reference_but_once(*_: object) -> list[str]:
        return ["red", *((answer(sample) or "nothing").upper() + "!" for sample in samples.samples[1:])]

    monkeypatch.setattr(run, "generate_texts", say_the_reference_but_once)
    tasks = evaluate_samples(model, processor, tokenizer, samples)[0].tasks
    assert [tasks[task].wer for task in ("answer", "converse")] == [0.0, 0.0]
    assert [tasks[task].exact_match for task in ("answer", "converse", "transcribe")] == [1.0, 1.0, pytest.approx(5 / 6)]
    references = [answer(sample) or "" for sample in samples.samples if sample.task == "transcribe"]
    assert tasks["transcribe"].wer == pytest.approx(jiwer.wer(references, ["red", *references[1:]]))


def test_codec_scores_are_pooled_over_tasks(evaluated: tuple[Evaluation, list[Answer]]) -> None:
    evaluation = evaluated[0]
    parts = [scores.codec for scores in evaluation.tasks.values() if scores.codec]
    assert evaluation.codec is not None and evaluation.codec.loss_swapped_text is not None
    frames = [part.frames for part in parts]
    assert evaluation.codec.frames == sum(frames)
    for k in range(K):
        assert evaluation.codec.loss[k] == pytest.approx(np.average([part.loss[k] for part in parts], weights=frames))
    assert set(evaluation.to_json()) == {"answer", "converse", "speech_to_speech", "transcribe", "codec", "seconds"}


def test_recordings(
    evaluated: tuple[Evaluation, list[Answer]], model: OmniForConditionalGeneration, samples: MemorySamples, folder: Path
) -> None:
    recorded = {number: one for number, one in enumerate(evaluated[1]) if one.generated_wav}
    assert len(recorded) == 3 and all(samples.sample(number).num_frames for number in recorded)
    for number, one in recorded.items():
        assert one.input_wav and one.target_wav and one.generated_wav
        arrays = samples.arrays(number)
        heard, rate = soundfile.read(folder / one.input_wav, dtype="float32")
        assert rate == 16000 and np.abs(heard - list(arrays.audio.values())[-1]).max() < 1e-4
        target, rate = soundfile.read(folder / one.target_wav, dtype="float32")
        assert rate == 24000 and len(target) == 1920 * list(arrays.codes.values())[-1].shape[1]
        generated, rate = soundfile.read(folder / one.generated_wav)
        assert rate == 24000 and len(generated) % 1920 == 0 and len(generated) > 0


def test_it_is_deterministic(
    evaluated: tuple[Evaluation, list[Answer]],
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    tokenizer: OmniTokenizer,
    samples: MemorySamples,
    tmp_path: Path,
    folder: Path,
) -> None:
    again, answers = evaluate_samples(model, processor, tokenizer, samples, 7, ["kind", "unknown"], tmp_path / "speech", 3)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(evaluated[0], seconds=0)
    assert answers == evaluated[1]
    for one in answers:
        if one.generated_wav:
            assert (tmp_path / one.generated_wav).read_bytes() == (folder / one.generated_wav).read_bytes()


def test_refusals(
    model: OmniForConditionalGeneration, processor: OmniProcessor, tokenizer: OmniTokenizer, samples: MemorySamples, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no samples to score"):
        evaluate_samples(model, processor, tokenizer, Selection(samples, []))
    other = dataclasses.replace(samples, codec=CodecConfig(num_codebooks=K, card=2048, frame_rate=12.5, sample_rate=24000))
    with pytest.raises(InputError, match="codes of another codec"):
        evaluate_samples(model, processor, tokenizer, other)
    with pytest.raises(InputError, match="no exported model at"):
        evaluate(tmp_path / "nothing", [tmp_path])


def test_spread() -> None:
    assert spread(range(5), None) == spread(range(5), 9) == [0, 1, 2, 3, 4]
    assert spread(range(10, 20), 3) == [10, 13, 16]
    assert spread([], 2) == spread(range(4), 0) == []


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """The exit code of ``tools/evaluate.py``, run here: a process of its own would take ten seconds to import."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "tools/evaluate.py"), run_name="__main__")
    return exit_.value.code


def test_the_tool(tokenizer: OmniTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tokenizer)
    model.codec.save_pretrained(tmp_path / "codec")
    assert model.config.omni is not None
    model.config.omni["codec"] = Mimi.from_pretrained(tmp_path / "codec").config().model_dump()
    model.save_pretrained(tmp_path / "model")
    OmniProcessor.of(model.config.model, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    random = np.random.default_rng(0)
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(tmp_path / name, random.normal(0, 0.1, 12000), 16000)
    lines = [
        {"id": f"u{n}", "audio": "abc"[n % 3] + ".wav", "text": WORDS[n], "task": "answer", "target_audio": "abc"[(n + 1) % 3] + ".wav"}
        for n in range(5)
    ] + [{"id": f"t{n}", "audio": "abc"[n % 3] + ".wav", "text": WORDS[n], "task": "transcribe"} for n in range(5)]
    (tmp_path / "m.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    build_shards(tmp_path / "m.jsonl", tmp_path / "shards", tmp_path / "codec", workers=0)

    where = ["--model", tmp_path / "model", "--shards", tmp_path / "shards", "--report", tmp_path / "out" / "eval.json"]
    code = run_tool(monkeypatch, *where, "--max-samples", 8, "--speech-samples", 2, "--batch-size", 3, "--json")
    summary = orjson.loads(capsys.readouterr().out)
    assert code == 0
    report = orjson.loads((tmp_path / "out" / "eval.json").read_bytes())
    assert {key: report[key] for key in summary} == summary
    assert summary["answer"]["samples"] + summary["transcribe"]["samples"] == len(report["samples"]) == 8
    assert len(summary["codec"]["loss"]) == len(summary["codec"]["entropy"]) == len(summary["codec"]["loss_swapped_text"]) == K
    heard = [sample for sample in report["samples"] if sample["generated_wav"]]
    assert len(heard) == 2 and all((tmp_path / "out" / sample["target_wav"]).is_file() for sample in heard)

    assert run_tool(monkeypatch, *where[:2], "--shards", tmp_path / "codec") == 2
    assert "dataset.json" in capsys.readouterr().err
