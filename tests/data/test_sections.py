"""The container of binary tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_omni.data.shards.sections import SPAN, TEXT, Strings, open_sections, text_at, to_bytes
from megatron_omni.runtime.errors import WorkError

ROW = np.dtype([("name", *SPAN), ("value", "<u8"), ("small", "u1")])


@pytest.mark.parametrize("names", [[], ["a"], ["überall", "b", "überall"]])
def test_round_trip(tmp_path: Path, names: list[str]) -> None:
    strings = Strings()
    rows = np.array([(strings.span(name), number << 40, number) for number, name in enumerate(names)], ROW)
    (tmp_path / "t").write_bytes(to_bytes(b"OMNI.TST", 3, [rows, strings.section()]))
    got, text = open_sections(tmp_path / "t", b"OMNI.TST", 3, (ROW, TEXT))
    assert [text_at(text, row["name"]) for row in got] == names
    np.testing.assert_array_equal(got, rows)
    assert not got.flags.writeable
    assert len(text) == len("".join(set(names)).encode())


def test_another_kind_version_or_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    content = to_bytes(b"OMNI.TST", 3, [np.arange(3, dtype=np.uint64)])
    cases = [
        (content, b"OMNI.TST", 2, "format version 3, this program reads 2"),
        (content, b"OMNI.XXX", 3, "it is another file"),
        (content[:-1], b"OMNI.TST", 3, "checksum"),
        (content[:20], b"OMNI.TST", 3, "another file, or cut"),
        (b"", b"OMNI.TST", 3, "cannot be read"),
    ]
    for data, magic, version, says in cases:
        path.write_bytes(data)
        with pytest.raises(WorkError, match=says):
            open_sections(path, magic, version, (np.dtype("<u8"),))
