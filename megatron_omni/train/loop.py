"""The loop: rows in, steps, reports and checkpoints out."""

from __future__ import annotations

import dataclasses
import resource
import time
from itertools import islice
from types import TracebackType

import orjson
import torch
import torch.distributed as dist

from megatron_omni.checkpoint.comm import Comm
from megatron_omni.checkpoint.load import Checkpoint
from megatron_omni.checkpoint.save import save, save_frozen
from megatron_omni.checkpoint.state import CheckpointState, SavedTopology
from megatron_omni.data.rows.stream import RowStream, StepRows, StreamState
from megatron_omni.engine import zero_state
from megatron_omni.engine.engine import OmniEngine, StepResult
from megatron_omni.runtime.logs import get_logger
from megatron_omni.schema import Batch, StepReport
from megatron_omni.train.metrics import MetricsWriter
from megatron_omni.train.schedule import lr_at
from megatron_omni.train.shared_rows import SharedRows
from megatron_omni.train.unigram import UnigramEntropy

logger = get_logger(__name__)


class Trainer:
    """Runs an engine over a stream from ``start_step`` to the recipe's last step."""

    def __init__(
        self,
        engine: OmniEngine,
        stream: RowStream,
        comm: Comm,
        fingerprints: dict[str, str],
        start_step: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        codec = engine.model_config.codec
        assert codec is not None
        self.engine, self.comm = engine, comm
        self.rows = SharedRows(stream, engine.groups.topology)
        self.recipe = engine.recipe
        self.fingerprints = fingerprints
        self.start_step = start_step
        self.samples = checkpoint.state.samples if checkpoint else 0
        self.skipped = 0
        self._frozen = (
            checkpoint.frozen if checkpoint else save_frozen(self.recipe.run.dir, zero_state.frozen_slices(engine.deepspeed), comm)
        )
        self._unigram = UnigramEntropy(codec.num_codebooks, codec.card + 1, engine.groups.get_data_parallel_group())
        self._metrics = MetricsWriter(self.recipe.run.dir, self.recipe, comm.rank, start_step)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()

    def run(self) -> StepReport | None:
        """Trains to the end and returns the last step's report; None if there was nothing left to do."""
        train, report = self.recipe.train, None
        started = time.perf_counter()
        for step, rows in zip(range(self.start_step, train.steps), islice(self.rows, train.steps - self.start_step), strict=True):
            waited = time.perf_counter() - started
            lr = lr_at(step, self.recipe.optim, train.steps)
            result = self.engine.step(step, [packed.batch for packed in rows.micro_batches], lr)
            for packed in rows.micro_batches:
                self._unigram.add(packed.batch)
            # all rows of the global batch: each tensor-parallel group counts its own once
            self.samples += int(self._sum(float(sum(len(row) for packed in rows.micro_batches for row in packed.keys))))
            self.skipped += len(rows.skipped)
            last = step + 1 == train.steps
            if last or (step + 1) % train.log_every == 0:
                report = self._report(step, lr, rows, result, time.perf_counter() - started, waited)
                self._metrics.write(report)
            if last or (step + 1) % train.save_every == 0:
                self.save(step + 1, rows.state)
            started = time.perf_counter()
        return report

    def save(self, steps_done: int, stream_state: StreamState) -> None:
        """Saves a checkpoint from which any topology goes on with the next step."""
        states = self.comm.gather(stream_state.to_json())
        merged = StreamState.merge([StreamState.from_json(state) for state in states]).to_json() if states else None
        topology = self.engine.groups.topology
        state = CheckpointState(
            step=steps_done,
            samples=self.samples,
            topology=SavedTopology(data=topology.data, tensor=topology.tensor, zero=self.engine.stage),
            data=orjson.loads(orjson.dumps(self.comm.broadcast(merged))),
            fingerprints=self.fingerprints,
            model=self.engine.model_config,
            recipe=self.recipe.model_dump(mode="json"),
        )
        path = save(
            self.recipe.run.dir,
            state,
            zero_state.slices(self.engine.deepspeed),
            self.comm,
            frozen=self._frozen,
            keep_last=self.recipe.train.keep_last,
        )
        logger.info("saved %s", path)

    def _report(self, step: int, lr: float, rows: StepRows, result: StepResult, seconds: float, waited: float) -> StepReport:
        batches = [packed.batch for packed in rows.micro_batches]
        tokens, heard = self._sum(_count_tokens(batches)), self._sum(self._audio_seconds(batches))
        fill = {name: value for name, value in dataclasses.asdict(rows.fill).items() if isinstance(value, float)}
        return StepReport(
            step=step,
            loss=result.loss,
            text_loss=result.text_loss,
            text_accuracy=result.text_accuracy,
            codec_loss=result.codec_loss,
            codec_accuracy=result.codec_accuracy,
            codec_entropy=self._unigram.value(self.engine.device),
            grad_norm=result.grad_norm,
            lr=lr,
            tokens_per_second=tokens / seconds,
            audio_seconds_per_second=heard / seconds,
            fill={name: self._sum(value) / self.engine.groups.topology.data for name, value in fill.items()},
            seconds=seconds,
            data_wait_seconds=waited,
            data_stall=self._largest(waited / seconds),
            skipped_samples=int(self._sum(self.skipped)),
            memory_bytes=_peak_memory(self.engine.device),
        )

    def _audio_seconds(self, batches: list[Batch]) -> float:
        """Heard (encoder) and spoken (codec) seconds of this rank's rows."""
        config = self.engine.model_config
        assert config.codec is not None
        hop = config.features.hop_length / config.features.sample_rate
        heard = sum(int(batch.mel_valid_RA.sum()) for batch in batches) * hop
        spoken = sum(int((batch.codes_BKF[:, 0] >= 0).sum()) for batch in batches) / config.codec.frame_rate
        return heard + spoken

    def _sum(self, value: float) -> float:
        """Over data parallel; ranks of a tensor-parallel group hold the same rows."""
        total = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total, group=self.engine.groups.get_data_parallel_group())
        return total.item()

    def _largest(self, value: float) -> float:
        """Over all ranks."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()


def _count_tokens(batches: list[Batch]) -> float:
    return float(sum(int((batch.segments_BT >= 0).sum()) for batch in batches))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
