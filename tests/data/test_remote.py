"""Data sets behind a URL: whatever a server does, no wrong byte is accepted and nothing waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megatron_omni.data.building.index_tars import index_tars
from megatron_omni.data.shards.cache import FolderCache
from megatron_omni.data.shards.dataset import ShardedDataset
from megatron_omni.data.shards.remote import RemoteOptions, url_of
from megatron_omni.data.sources.columns import load_columns
from megatron_omni.runtime.errors import InputError, OmniError, WorkError
from tests.data.corpus import flip_bit
from tests.data.folders import codes_of, foreign, sample_of, wave_of, write_folder

TAR = "shard-000001.tar"
STALL = 0.3
"""Seconds after which a request is given up."""
BOUND = 8.0
"""Seconds that no fault may take longer than: three attempts of STALL for each of a few files, and room for a busy machine."""

Fault = Callable[["Handler", bytes, bytes], None]
"""Answers a request; it is given the bytes that were asked for, and the whole file."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, tuple[Fault, int]] = {}
        """By file name: what happens, and how many more times."""
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/set/")
        path = self.server.folder / name.removeprefix("elsewhere-")
        with self.server.lock:
            self.server.requests[name] += 1
            fault, left = self.server.faults.get(name, (whole, 1))
            self.server.faults[name] = (fault if left > 1 else whole, left - 1)
        if not path.is_file():
            self.answer(404, b"")
            return
        data = path.read_bytes()
        asked = self.headers.get("Range")
        start, stop = (int(number) for number in asked.removeprefix("bytes=").split("-")) if asked else (0, len(data) - 1)
        fault(self, data[start : stop + 1], data)

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


# --------------------------------------------------------------------------- what a server may do


def whole(handler: Handler, part: bytes, _: bytes) -> None:
    handler.answer(206 if handler.headers.get("Range") else 200, part)


def status(code: int) -> Fault:
    return lambda handler, part, data: handler.answer(code, b"busy")


def reset(handler: Handler, part: bytes, data: bytes) -> None:
    handler.close_connection = True
    handler.connection.shutdown(2)


def reset_midway(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(206, part[: len(part) // 2], len(part))
    reset(handler, part, data)


def stall(handler: Handler, part: bytes, data: bytes) -> None:
    time.sleep(5 * STALL)
    handler.close_connection = True


def stall_midway(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(206, part[: len(part) // 2], len(part))
    stall(handler, part, data)


def drip(handler: Handler, part: bytes, data: bytes) -> None:
    """A few bytes at a time, so that no read stalls, and yet it does not end in time."""
    handler.answer(206, b"", len(part))
    for place in range(0, 50):
        handler.wfile.write(part[place : place + 1])
        time.sleep(STALL / 10)
    handler.close_connection = True


def short(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(206, part[:-10])


def long(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(206, part + b"more")


def wrong_bytes(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(206, bytes(byte ^ 1 for byte in part))


def other_file(handler: Handler, part: bytes, data: bytes) -> None:
    other = (handler.server.folder / "shard-000000.tar").read_bytes()
    handler.answer(206, other.ljust(len(part), b"\0")[: len(part)])


def no_ranges(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(200, data)


def error_page(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(200, b"<html>Please log in</html>")


def redirect(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(302, b"", Location=f"/set/elsewhere-{TAR}")


def redirect_for_ever(handler: Handler, part: bytes, data: bytes) -> None:
    handler.answer(302, b"", Location=f"/set/{TAR}")


def no_http(handler: Handler, part: bytes, data: bytes) -> None:
    handler.wfile.write(b"\x00\x01 what?\r\n\r\n")
    handler.close_connection = True


ALWAYS = 1000
FAULTS: dict[str, tuple[Fault, int, str]] = {
    # fault, how many times, and what the error says; "" where the data come in the end
    "500 twice": (status(500), 2, ""),
    "503 for ever": (status(503), ALWAYS, "after 3 attempts"),
    "429 once": (status(429), 1, ""),
    "403": (status(403), ALWAYS, "after 1 attempts"),
    "404": (status(404), ALWAYS, "no such file"),
    "reset": (reset, 1, ""),
    "reset midway": (reset_midway, 2, ""),
    "reset for ever": (reset_midway, ALWAYS, "after 3 attempts"),
    "stall": (stall, 1, ""),
    "stall for ever": (stall, ALWAYS, "timed out"),
    "stall midway": (stall_midway, ALWAYS, "timed out"),
    "drip": (drip, ALWAYS, "timed out"),
    "short range": (short, ALWAYS, "bytes came, expected"),
    "long range": (long, ALWAYS, "bytes came, expected"),
    "wrong bytes once": (wrong_bytes, 1, ""),
    "wrong bytes for ever": (wrong_bytes, ALWAYS, "sha256 of what came|tar header is damaged|do not match the hash"),
    "another file": (other_file, ALWAYS, "sha256 of what came|tar header is damaged|do not match the hash"),
    "ranges ignored": (no_ranges, ALWAYS, ""),
    "an error page": (error_page, ALWAYS, "bytes came, expected"),
    "redirect": (redirect, ALWAYS, ""),
    "redirect for ever": (redirect_for_ever, ALWAYS, "TooManyRedirects"),
    "no HTTP": (no_http, ALWAYS, "after 3 attempts"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("remote") / "set")


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def options(tmp_path: Path, reads: Any = "shards", cache_bytes: int = 10**9) -> RemoteOptions:
    return RemoteOptions(tmp_path / "cache", cache_bytes, reads, timeout=STALL, attempts=3, backoff=0.01, max_backoff=0.05)


def require_right(data: ShardedDataset) -> None:
    for number in range(len(data)):
        sample, arrays = data.both(number)
        assert sample == sample_of(number)
        np.testing.assert_array_equal(arrays.codes["codes0"], codes_of(number))
        assert arrays.audio["audio0"].shape == (1600,)


# --------------------------------------------------------------------------- faults


RANGES = {"stall midway", "short range", "wrong bytes once", "wrong bytes for ever", "ranges ignored"}
"""Tried with ranged reads too; ``slow`` tries all."""
CASES = [(kind, "shards") for kind in FAULTS] + [
    pytest.param(kind, "ranges", marks=() if kind in RANGES else pytest.mark.slow) for kind in FAULTS
]


@pytest.mark.parametrize(("kind", "reads"), CASES)
def test_no_wrong_byte_is_accepted_and_nothing_waits_for_ever(kind: str, reads: str, server: Server, tmp_path: Path) -> None:
    fault, times, says = FAULTS[kind]
    data = ShardedDataset.open([server.url], options(tmp_path, reads))
    server.faults[TAR] = (fault, times)
    began = time.monotonic()
    if says:
        with pytest.raises(OmniError, match=says) as caught:
            require_right(data)
        assert f"{server.url}/{TAR}" in str(caught.value)
    else:
        require_right(data)
    assert time.monotonic() - began < BOUND
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    server.faults.clear()
    require_right(data)  # and it goes on when the server does


@pytest.mark.parametrize("name", ["dataset.json", "shards.bin", "shard-000000.index"])
@pytest.mark.parametrize("fault", [status(503), stall, wrong_bytes, error_page])
def test_the_small_files_are_checked_too(name: str, fault: Fault, server: Server, tmp_path: Path) -> None:
    server.faults[name] = (fault, ALWAYS)
    began = time.monotonic()
    with pytest.raises(OmniError, match=name):
        require_right(ShardedDataset.open([server.url], options(tmp_path)))
    assert time.monotonic() - began < BOUND


def test_places_that_are_no_data_set_are_refused(server: Server, tmp_path: Path) -> None:
    for place, says in (
        ("pipe:cat /etc/passwd", "would run a command"),
        (f"{server.url}/nowhere", "no such file"),
        ("nosuch://bucket/set", "nosuch"),
    ):
        with pytest.raises(InputError, match=says):
            ShardedDataset.open([place], options(tmp_path))
    with pytest.raises(WorkError, match="cannot be read after 3 attempts"):
        ShardedDataset.open(["http://127.0.0.1:9/set"], options(tmp_path))


# --------------------------------------------------------------------------- the cache


def test_a_shard_comes_once_and_stays(server: Server, tmp_path: Path) -> None:
    require_right(ShardedDataset.open([server.url], options(tmp_path)))
    first = server.requests.copy()
    data = pickle.loads(pickle.dumps(ShardedDataset.open([server.url], options(tmp_path))))
    require_right(data)
    assert {name for name in server.requests if server.requests[name] > first[name]} == {"dataset.json"}
    assert data.fingerprint == ShardedDataset.open([server.folder]).fingerprint
    assert data.shard_of(5) == f"{server.url}/{TAR}"


def test_ranges_bring_less_than_the_shard(folder: Path, server: Server, tmp_path: Path) -> None:
    data = ShardedDataset.open([server.url], options(tmp_path, "ranges"))
    data.both(5)
    assert server.requests["shard-000000.tar"] == 0 and server.requests[TAR] == 1
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_damaged_copy_is_brought_again(server: Server, tmp_path: Path) -> None:
    require_right(ShardedDataset.open([server.url], options(tmp_path)))
    for copy in (tmp_path / "cache").rglob("*.tar"):
        flip_bit(copy, 7200)
    require_right(ShardedDataset.open([server.url], options(tmp_path)))
    for copy in (tmp_path / "cache").rglob("*.tar"):
        os.truncate(copy, 3000)
    require_right(ShardedDataset.open([server.url], options(tmp_path)))


def test_the_cache_is_bounded(folder: Path, server: Server, tmp_path: Path) -> None:
    size = (folder / TAR).stat().st_size + (folder / "shard-000001.index").stat().st_size
    data = ShardedDataset.open([server.url], options(tmp_path, cache_bytes=size + 10))
    for _ in range(2):
        require_right(data)
    held = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert held <= size + 10
    assert data.codes(0)["codes0"].tolist() == codes_of(0).tolist()  # evicted, and still mapped


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path / "cache", 250)

    def fill(folder: Path) -> None:
        (folder / "file").write_bytes(bytes(100))

    for number, key in enumerate("ab"):
        os.utime(cache.get(key, fill), (number, number))
    cache.get("a", fill)
    cache.get("c", fill)
    assert {path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")} == {"a", "c"}
    with pytest.raises(WorkError, match="cannot be written"):
        cache.get("d", lambda folder: (folder / "x" / "y").touch())
    assert not list((tmp_path / "cache").glob(".d*"))


def _read(url: str, folder: Path) -> None:
    require_right(ShardedDataset.open([url], RemoteOptions(folder / "cache")))


def test_processes_share_what_came(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_read, args=(server.url, tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert server.requests[TAR] == 1


def test_a_fork_reads_on(server: Server, tmp_path: Path) -> None:
    """As the workers of a DataLoader do."""
    data = ShardedDataset.open([server.url], options(tmp_path))
    data.sample(0)
    process = multiprocessing.get_context("fork").Process(target=require_right, args=(data,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_prefetched_shards_are_there(server: Server, tmp_path: Path) -> None:
    data = ShardedDataset.open([server.url], options(tmp_path))
    data.prefetch(range(8))
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*/shard.tar"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.faults = defaultdict(lambda: (status(503), ALWAYS))
    require_right(data)


def test_any_file_system_will_do(folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/set", recursive=True)
    try:
        for reads in ("shards", "ranges"):
            require_right(ShardedDataset.open(["memory://bucket/set/"], options(tmp_path, reads)))
    finally:
        memory.rm("/bucket", recursive=True)
    require_right(ShardedDataset.open([f"file://{folder}"]))


def test_conversations_beside_foreign_tars_come_too(server: Server, tmp_path: Path) -> None:
    foreign(tmp_path / "set" / "a.tar", ["a.wav", "a.txt", "b.wav", "b.txt"])
    index_tars([tmp_path / "set" / "a.tar"], load_columns("webdataset"), None)
    server.folder = tmp_path / "set"
    for reads in ("shards", "ranges"):
        data = ShardedDataset.open([server.url], options(tmp_path, reads))
        assert [sample.messages[1].content[0].value for sample in data.samples()] == ["word", "word"]
        np.testing.assert_allclose(data.arrays(1).audio["audio0"], wave_of(0), atol=1e-4)


def test_a_path_may_hold_a_url() -> None:
    assert url_of(Path("s3://bucket/set")) == "s3://bucket/set" == url_of("s3://bucket/set/")
    assert url_of(Path("/data/set")) is None is url_of("set")
