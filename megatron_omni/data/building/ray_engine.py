"""The builder on a Ray cluster: decoding tasks on any CPU, encoding actors that hold the codec and write shards.

The data set's folder has to be one that all nodes see, or a URL; so has the collection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import torch

from megatron_omni.data.building.codec_choice import CodecChoice
from megatron_omni.data.building.options import BuildOptions
from megatron_omni.data.building.output import Output
from megatron_omni.data.building.prepare import Prepared
from megatron_omni.data.building.shard import Chunk, Group, Receipt, Slice, encoded, groups_of, prepare_chunk, write_shard
from megatron_omni.data.sources.line import Reject
from megatron_omni.data.sources.source import Source

SHARDS_AHEAD = 2
"""Shards per actor that are handed out before its last one is done."""


class _Encoder:
    """An actor: one codec on one device."""

    def __init__(self, options: BuildOptions, out: str, choice: CodecChoice | None) -> None:
        self._options, self._out = options, Output(out)
        self._codec = None if choice is None else choice.load(choice.devices[0])

    def build(self, part: Slice, inputs: str, chunks: list[Any]) -> Receipt:
        """``chunks``: references to the decoded chunks, fetched one by one."""

        def results() -> Iterator[tuple[int, Prepared | Reject]]:
            while chunks:
                yield from ((part.number, item) for item in ray.get(chunks.pop(0)))

        groups = groups_of(results(), 1 if self._codec is None else self._codec.sample_rate)
        return write_shard(self._out, part, inputs, (encoded(group, self._codec) for _, group in groups))


def _decode(source: Source, options: BuildOptions, chunk: Chunk) -> Group:
    torch.set_num_threads(1)
    return prepare_chunk(source, options, chunk)


def build_with_ray(
    source: Source, options: BuildOptions, out: Output, missing: Sequence[Slice], inputs: Mapping[int, str], choice: CodecChoice | None
) -> Iterator[Receipt]:
    """Builds shards on the cluster that is running (``RAY_ADDRESS``), or on one of this machine's cores; receipts as they come."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    on_gpu = choice is not None and choice.devices[0].startswith("cuda")
    resource = "GPU" if on_gpu else "CPU"
    # on CPUs half of them encode, so that decoding never waits for an actor to end
    count = max(1, int(ray.cluster_resources().get(resource, 1)) // (1 if on_gpu else 2))
    actor: Any = ray.remote(_Encoder).options(num_gpus=int(on_gpu), num_cpus=0 if on_gpu else 0.5)
    encoders = [actor.remote(options, out.where, choice) for _ in range(min(count, max(1, len(missing))))]
    decode = ray.remote(_decode).options(num_cpus=0.5)
    source_ref = ray.put(source)
    waiting: dict[Any, Any] = {}
    """Encoder by the reference of its shard."""
    todo = iter(missing)

    def hand_out(encoder: Any) -> None:
        part = next(todo, None)
        if part is not None:
            chunks = [decode.remote(source_ref, options, chunk) for chunk in part.chunks()]
            waiting[encoder.build.remote(part, inputs[part.number], chunks)] = encoder

    for encoder in encoders * SHARDS_AHEAD:
        hand_out(encoder)
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        encoder = waiting.pop(done)
        receipt: Receipt = ray.get(done)
        hand_out(encoder)
        yield receipt
    for encoder in encoders:
        ray.kill(encoder)
