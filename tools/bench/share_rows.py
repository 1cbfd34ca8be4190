"""What it costs that the ranks of a tensor-parallel group get the same rows: read in each, or read once and sent on.

Every rank is a process, as in training. CPU seconds are those of all processes, data workers included; the wait is what
the slowest rank waits for a step's rows while each step computes for a while.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from common import write_result
from start_stream import CODEC, GEOMETRY, SETTINGS, WORDS, describe, measure_lengths, write_shard

from megatron_omni.audio.features import LogMel
from megatron_omni.config.model import FeatureConfig
from megatron_omni.data.rows.pack import open_rows
from megatron_omni.data.rows.packer import RowPacker
from megatron_omni.data.rows.stream import RowStream
from megatron_omni.data.tokenizer import OmniTokenizer, prepare_tokenizer
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.parallel.topology import Topology
from megatron_omni.runtime import cli
from megatron_omni.train.shared_rows import SharedRows

ROWS = 2
"""Of 8192 positions, per step."""


def rank_main(rank: int, folder: Path, tensor: int, steps: int, compute: float, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(tensor)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokenizer = OmniTokenizer.load(folder / "tokenizer")
    rows = open_rows([folder], tokenizer, SETTINGS)
    longest = rows.demands.longest_clip
    packer = RowPacker(rows.samples, tokenizer, GEOMETRY, LogMel(FeatureConfig()), CODEC, SETTINGS.shape, 0, tensor, longest)
    places = dict(virtual_streams=ROWS, dp_rank=0, dp_size=1, micro_rows=1, micro_batches=ROWS, num_workers=1)
    results = {}
    for name in ("read in each", "read once and sent on"):
        stream = RowStream(packer, rows.plan, rows.fingerprint, **places)
        source = iter(stream if name == "read in each" else SharedRows(stream, Topology(tensor, tensor, rank)))
        next(source)
        next(source)
        waits, used = [], cpu_seconds()
        for _ in range(steps):
            time.sleep(compute)
            dist.barrier()  # the ranks of a group compute in step
            began = time.perf_counter()
            next(source)
            waits.append(time.perf_counter() - began)
        used = cpu_seconds() - used
        source.close()  # type: ignore[attr-defined]
        slowest, total = torch.tensor(waits), torch.tensor(used)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        results[name] = {"cpu_seconds_per_step": total.item() / steps, "median_wait_seconds": statistics.median(slowest.tolist())}
    if rank == 0:
        megabytes = packer.layout(1).num_bytes * ROWS / 2**20
        torch.save({"megabytes_per_step": megabytes, "ways": results}, folder / "results.pt")
    dist.destroy_process_group()


def cpu_seconds() -> float:
    """Of this process and its living children."""
    ticks = 0
    own = os.getpid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if own in (int(entry.name), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main(
    tensor: Annotated[int, typer.Option(help="Ranks of the group.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of each way.")] = 20,
    compute: Annotated[float, typer.Option(help="Seconds that a step computes.")] = 1.0,
) -> dict[str, object]:
    """Compares the two ways on rows of 8192 positions; writes results/share_rows.json."""
    folder = Path(tempfile.mkdtemp(prefix="share_rows"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        train_bpe([" ".join(WORDS)] * 10, folder / "base", 400)
        prepare_tokenizer(folder / "base", folder / "tokenizer")
        describe(folder, write_shard(folder, 200), 50)
        measure_lengths(folder, folder / "tokenizer")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        mp.spawn(rank_main, (folder, tensor, steps, compute, store.port), tensor)
        summary = torch.load(folder / "results.pt")
    finally:
        shutil.rmtree(folder)
    write_result("share_rows", {"tensor": tensor, "steps": steps, "compute_seconds": compute, "rows": ROWS} | summary)
    return summary


if __name__ == "__main__":
    cli.command(main)
