"""The end of a build: the receipts of all shards become ``shards.bin``, ``rejects.jsonl`` and, last, ``dataset.json``."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import orjson
import soundfile

from megatron_omni import __version__
from megatron_omni.data.building.options import BuildOptions
from megatron_omni.data.building.output import Output
from megatron_omni.data.building.shard import Slice, inputs_of, read_receipt
from megatron_omni.data.shards.info import AUDIO_RATE, DatasetInfo, Totals
from megatron_omni.data.shards.table import ShardRecord, write_table
from megatron_omni.data.sources.line import Reject
from megatron_omni.data.sources.source import Source
from megatron_omni.runtime.errors import WorkError
from megatron_omni.runtime.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class RuleCount:
    """What one rule found."""

    action: str
    samples: int
    hours: float
    """Of audio heard, as far as it could be read."""


@dataclass(frozen=True)
class BuildSummary:
    samples: int
    rejected: int
    hours: float
    """Of audio heard that was kept."""
    shards: int
    rules: dict[str, RuleCount]
    """By rule of the gate; ``input``: what cannot be read or is no sample."""
    faults: list[str]
    """Why the result is not to be used as it is; empty if it is."""


def summarize(records: Sequence[ShardRecord], rejects: Sequence[Reject], faults: list[str]) -> BuildSummary:
    rules = {}
    for rule in sorted({reject.rule for reject in rejects}):
        found = [reject for reject in rejects if reject.rule == rule]
        rules[rule] = RuleCount(found[0].action, len(found), sum(reject.seconds for reject in found) / 3600)
    return BuildSummary(
        samples=sum(record.samples for record in records),
        rejected=sum(record.rejected for record in records),
        hours=sum(record.wave_samples for record in records) / AUDIO_RATE / 3600,
        shards=len(records),
        rules=rules,
        faults=faults,
    )


def finish(out: Output, source: Source, options: BuildOptions, slices: Sequence[Slice], max_reject_rate: float) -> BuildSummary:
    """Merges the receipts; what lies there already is written again with the same bytes.

    Raises:
        WorkError: A shard is missing, or was built from other inputs.
    """
    records, rejects = [], []
    for part in slices:
        receipt = read_receipt(out, part)
        if receipt is None or receipt.inputs != inputs_of(source, part, options):
            state = "is missing" if receipt is None else "was built from other inputs"
            raise WorkError(f"{out.place(part.name)}: {state}; build its part again, with the same options, before --finalize")
        records.append(receipt.record)
        rejects += receipt.rejects
    _remove_leftovers(out, len(slices))
    table = write_table(records)
    out.write("shards.bin", table)
    out.write("rejects.jsonl", b"".join(orjson.dumps(reject) + b"\n" for reject in rejects))
    summary = summarize(records, rejects, [])
    totals = Totals(
        samples=summary.samples,
        rejected=summary.rejected,
        shards=summary.shards,
        hours=summary.hours,
        speech_hours=0.0 if options.codec is None else sum(record.frames for record in records) / options.codec.frame_rate / 3600,
        bytes=sum(record.tar_bytes for record in records),
    )
    info = DatasetInfo(
        sample_rate=options.sample_rate,
        codec=options.codec,
        totals=totals,
        manifest=source.name,
        manifest_xxh3=source.digest,
        build=options.model_dump(mode="json", exclude={"codec"}),
        samples_per_shard=options.samples_per_shard,
        command=_command(source, options),
        versions=_versions(),
        table_sha256=hashlib.sha256(table).hexdigest(),
    )
    out.write("dataset.json", info.to_json())
    share = totals.rejected / len(source)
    if share > max_reject_rate:
        summary.faults.append(
            f"{totals.rejected} of {len(source)} lines ({share:.1%}) were rejected, more than --max-reject-rate {max_reject_rate}; "
            f"the reasons are in {out.place('rejects.jsonl')}"
        )
    return summary


def _remove_leftovers(out: Output, count: int) -> None:
    """Removes shards of an earlier, longer build, which any reader of ``*.tar`` would find, and files of killed builders."""
    for name in out.names():
        match = re.fullmatch(r"shard-(\d{6,})\.(tar|index|receipt\.json)", name)
        if match and int(match[1]) >= count:
            logger.warning("%s: removed, the collection has no samples for it any more", out.place(name))
            out.remove(name)
    out.sweep()


def _command(source: Source, options: BuildOptions) -> str:
    """Only what changes the result: not the folder written to, not the number of processes."""
    command = ["make_shards", "--manifest", source.name, "--samples-per-shard", str(options.samples_per_shard)]
    if options.codec is not None:
        command += ["--codec", options.codec.name, "--num-codebooks", str(options.codec.num_codebooks)]
    return shlex.join(command)


def _versions() -> dict[str, str]:
    """Of all that computes bytes of a shard."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "soxr", "soundfile", "orjson")}
    return {"megatron_omni": __version__, **packages, "libsndfile": soundfile.__libsndfile_version__}
