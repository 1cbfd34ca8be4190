"""What a manifest line becomes, and each refusal by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_omni.data.sources.line import Clip
from megatron_omni.data.sources.manifest import Manifest
from megatron_omni.runtime.errors import InputError
from megatron_omni.schema import Message, Part
from tests.data.corpus import conversation, write_manifest

GOOD = {"id": "a", "audio": "a.wav", "text": "hello", "task": "transcribe"}


def entry(tmp_path: Path, **line: Any):
    manifest = Manifest.read(write_manifest(tmp_path / "m.jsonl", [{"id": "a", **line}]))
    return manifest.entries(0, 1)[0]


def test_a_line_becomes_a_conversation_with_the_prompt_of_its_task(tmp_path: Path) -> None:
    got = entry(tmp_path, audio="wavs/a.wav", text="Hello", task="transcribe", start=1, end=2.5, attributes={"age": 40})
    assert got.sample.messages == (
        Message("user", (Part("audio", "audio0"), Part("text", "Transcribe:"))),
        Message("assistant", (Part("text", "Hello"),)),
    )
    assert got.audio == {"audio0": Clip(tmp_path / "wavs/a.wav", 1.0, 2.5)}
    assert (got.sample.source, got.sample.attributes, got.line) == ("m", {"age": "40"}, 1)


def test_a_prompt_of_the_line_replaces_the_task_s(tmp_path: Path) -> None:
    assert entry(tmp_path, audio="a", text="x", task="transcribe", prompt="Say:").sample.messages[0].content[1] == Part("text", "Say:")
    assert entry(tmp_path, audio="a", text="x", task="transcribe", prompt="").sample.messages[0].content == (Part("audio", "audio0"),)


def test_speech_follows_the_text(tmp_path: Path) -> None:
    encoded = entry(tmp_path, audio="a", text="x", task="answer", target_audio="b.wav")
    ready = entry(tmp_path, audio="a", task="speech_to_speech", codes="b.npy")
    assert encoded.sample.messages[1].content == (Part("text", "x"), Part("codes", "codes0"))
    assert encoded.speech == {"codes0": Clip(tmp_path / "b.wav")} and encoded.codes == {}
    assert ready.sample.messages[1].content == (Part("codes", "codes0"),)
    assert ready.codes == {"codes0": tmp_path / "b.npy"} and ready.speech == {}


def test_a_conversation_numbers_its_arrays_on(tmp_path: Path) -> None:
    got = entry(tmp_path, task="converse", messages=conversation("a.wav"))
    assert [[part.value for part in message.content] for message in got.sample.messages] == [
        ["be kind"],
        ["audio0", "and?"],
        ["yes", "codes0"],
        ["audio1"],
        ["bye", "codes1"],
    ]
    assert got.audio["audio1"] == Clip(tmp_path / "a.wav", 0.1)
    assert (list(got.speech), list(got.codes)) == (["codes0"], ["codes1"])


def test_blank_lines_are_skipped_and_line_numbers_stay_true(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [GOOD, GOOD | {"id": "b"}])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n"))
    manifest = Manifest.read(path)
    assert [e.line for e in manifest.entries(0, 2)] == [1, 3]
    assert manifest.entries(1, 2)[0].sample.id == "b"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (GOOD | {"txt": "x"}, "unknown key 'txt'; did you mean 'text'"),
        (GOOD | {"task": "sing"}, "task: Input should be 'transcribe'"),
        (GOOD | {"id": "a.b"}, "no dot"),
        (GOOD | {"id": "../a"}, "no dot, slash"),
        (GOOD | {"id": "a\\b"}, "slash"),
        (GOOD | {"id": ""}, "not empty"),
        (GOOD | {"id": "x" * 81}, "81; shorten"),
        ({"id": "a", "text": "x", "task": "answer"}, "no 'audio'"),
        ({"id": "a", "audio": "x", "task": "answer"}, "nothing to learn"),
        ({"audio": "x", "text": "x", "task": "answer"}, "key 'id' is missing"),
        (GOOD | {"text": ["x"]}, "text: Input should be a valid string, got ['x']"),
        (GOOD | {"codes": "c.npy", "target_audio": "t.wav"}, "both 'target_audio' and 'codes'"),
        (GOOD | {"messages": conversation("a.wav")}, "move audio, text into it"),
        ({"id": "a", "task": "converse", "messages": conversation("a")[:2]}, "no turn of the assistant"),
        (
            {"id": "a", "task": "converse", "messages": [{"role": "assistant", "content": [{"type": "audio", "audio": "x"}]}]},
            "only the user",
        ),
        (
            {"id": "a", "task": "converse", "messages": [{"role": "user", "content": [{"type": "codes", "codes": "x"}]}]},
            "only the assistant",
        ),
        ({"id": "a", "task": "converse", "messages": [{"role": "assistant", "content": [{"type": "codes"}]}]}, "either 'codes'"),
        ({"id": "a", "task": "converse", "messages": [{"role": "assistant", "content": []}]}, "at least one part"),
        ({"id": "a", "task": "converse", "messages": [{"role": "user", "content": "x", "txt": 1}]}, "unknown key 'messages.0.txt'"),
        ([1, 2], "should be an object"),
    ],
)
def test_a_broken_line_is_refused_by_line(tmp_path: Path, line: Any, says: str) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [GOOD | {"id": "good"}, line])
    with pytest.raises(InputError) as error:
        Manifest.read(path)
    assert f"{path}:2: " in str(error.value) and says in str(error.value)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for bad in (b'{"id": "a", ', b'{"id": "\xff"}', b"hello"):
        path.write_bytes(bad + b"\n")
        with pytest.raises(InputError, match=r"m\.jsonl:1: Invalid JSON"):
            Manifest.read(path)


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [GOOD, GOOD | {"id": "b"}, GOOD])
    with pytest.raises(InputError, match=r"m\.jsonl:3: id 'a' is that of line 1 too"):
        Manifest.read(path)


def test_twenty_faults_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [GOOD | {"id": f"u{n}", "task": "sing"} for n in range(30)])
    with pytest.raises(InputError) as error:
        Manifest.read(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and "faults: 30" in lines[0] and lines[-1] == "... and 10 more"


def test_an_empty_or_missing_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\n")
    for name, says in (("m.jsonl", "holds no line"), ("n.jsonl", "No such file")):
        with pytest.raises(InputError, match=says):
            Manifest.read(tmp_path / name)
