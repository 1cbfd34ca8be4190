"""``dataset.json``: what a data set says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_omni.config.model import CodecConfig
from megatron_omni.runtime.errors import InputError, WorkError

FILE = "dataset.json"

AUDIO_RATE = 16_000
"""Hz of the audio members: the encoder's rate."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CodecProvenance(CodecConfig):
    """The codec that made the codes."""

    name: str
    """Folder name or Hub id."""

    def config(self) -> CodecConfig:
        return CodecConfig.model_validate(self.model_dump(exclude={"name"}))


class Totals(_Record):
    samples: int
    rejected: int
    shards: int
    hours: float
    """Of audio heard."""
    speech_hours: float
    """Of speech as codes."""
    bytes: int


class DatasetInfo(_Record):
    """``dataset.json``."""

    format_version: Literal[1] = 1
    sample_rate: int | None
    """Hz of the audio members, all mono; None: each has its own rate and channels, as others recorded it."""
    codec: CodecProvenance | None
    totals: Totals
    manifest: str
    """Name of the collection."""
    manifest_xxh3: str
    build: dict[str, Any] = {}
    """The options that its shards depend on."""
    samples_per_shard: int
    command: str
    versions: dict[str, str]
    table_sha256: str
    """Of ``shards.bin``."""
    checksum: str = ""
    """xxh3-128 of all of the above, hex."""

    def to_json(self) -> bytes:
        """The file, with its checksum."""
        sealed = self.model_copy(update={"checksum": self._digest()})
        return sealed.model_dump_json(indent=2).encode() + b"\n"

    def _digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.model_dump_json(exclude={"checksum"}).encode())

    @classmethod
    def read(cls, folder: Path) -> DatasetInfo:
        """As ``parse``; raises ``InputError`` also where there is no complete data set."""
        path = folder / FILE
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a folder that make_shards has finished") from error

    @classmethod
    def parse(cls, content: bytes, place: str) -> DatasetInfo:
        """The content of the file ``place``.

        Raises:
            InputError: It is of another version, or no such file.
            WorkError: It is damaged.
        """
        try:
            info = cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise InputError(
                f"{place}: {where}: {first['msg']}, got {first['input']!r:.80}; update this program, or build again"
            ) from error
        if info.checksum and info.checksum != info._digest():
            raise WorkError(f"{place}: its content does not match its checksum; start make_shards again, finished shards are kept")
        return info
