"""The main job, end to end, on a machine without GPU: ``python -m megatron_omni.demo.run`` (``make demo``).

Each stage runs the command that a user would run, in a process of its own, and leaves ``runs/demo/stages/NAME.json``;
a stage whose file is there is not run again. Remove ``runs/demo`` to start over.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import psutil
import typer

from megatron_omni.checkpoint.save import checkpoints
from megatron_omni.config.load import load_recipe
from megatron_omni.demo.fit_codec import fit_codec
from megatron_omni.demo.speak import speak_corpus
from megatron_omni.demo.train_tokenizer import train_bpe
from megatron_omni.runtime import cli
from megatron_omni.runtime.errors import WorkError
from megatron_omni.runtime.files import atomic_write
from megatron_omni.runtime.logs import get_logger
from megatron_omni.runtime.run_directory import RunDirectory

logger = get_logger(__name__)

SPLITS = ("train", "dev", "heldout_known", "heldout_unseen")
REPLAYED_STEPS = 5
"""Steps after the checkpoint that are run twice, once before the kill and once after, and must agree bit for bit."""


@dataclass(frozen=True)
class Demo:
    """Where everything lies."""

    root: Path
    recipe: Path

    @property
    def run(self) -> Path:
        return self.root / "run"

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """The stage's summary: from its file if it ran before, else from running it now."""
        record = self.root / "stages" / f"{name}.json"
        if record.exists():
            logger.info("%s: done before", name)
            return orjson.loads(record.read_bytes())["summary"]
        logger.info("%s ...", name)
        started = time.monotonic()
        summary = cli.to_dict(work())
        seconds = time.monotonic() - started
        atomic_write(record, orjson.dumps({"summary": summary, "seconds": seconds}))
        logger.info("%s: %.0f s  %s", name, seconds, orjson.dumps(summary).decode()[:300])
        return summary

    def minutes(self) -> float:
        """Of all stages, also those of earlier starts."""
        return sum(orjson.loads(record.read_bytes())["seconds"] for record in (self.root / "stages").glob("*.json")) / 60

    # ------------------------------------------------------------------ stages

    def speak(self) -> dict[str, Any]:
        return cli.to_dict(speak_corpus(self.root / "corpus"))

    def codec(self) -> dict[str, Any]:
        voices = sorted((self.root / "corpus" / "assistant").glob("*.flac"))
        return {"codec": str(fit_codec(voices, self.root / "codec", seed=0))}

    def shards(self) -> dict[str, Any]:
        built = {}
        for split in SPLITS:
            manifest, out = self.root / "corpus" / f"{split}.jsonl", self.root / "shards" / split
            built[split] = tool("make_shards", "--manifest", manifest, "--out", out, "--codec", self.root / "codec", "--workers", "2")
        return built

    def tokenizer(self) -> dict[str, Any]:
        lines = (self.root / "corpus" / "train.jsonl").read_bytes().splitlines()
        texts = [orjson.loads(line)["text"] for line in lines]
        base = self.root / "base_tokenizer"
        train_bpe(texts, base, vocab_size=512)
        return tool("prepare_tokenizer", "--base", base, "--out", self.root / "tokenizer")

    def rows(self) -> dict[str, Any]:
        recipe = load_recipe(self.recipe)
        row, encoder, shape = recipe.row, recipe.model.encoder, recipe.model.projector
        geometry = ("--conv-strides", ",".join(map(str, encoder.conv_strides)), "--stack", shape.stride)
        lengths: tuple[object, ...] = ("--seq-len", row.seq, "--codec-len", row.codec, "--encoder-len", row.encoder)
        lengths += ("--spoken-len", row.spoken, "--supervised-len", row.supervised)
        where = ("--shards", self.root / "shards" / "train", "--tokenizer", self.root / "tokenizer", "--out", self.root / "plan")
        return tool("pack_sequences", *where, *lengths, *geometry)

    def train(self) -> dict[str, Any]:
        """First half data parallel, killed; a copy replays the steps after the checkpoint; second half tensor parallel."""
        recipe = load_recipe(self.recipe)
        half = recipe.train.steps // 2 // recipe.train.save_every * recipe.train.save_every
        replayed = range(half, half + REPLAYED_STEPS)
        data = (f"data.train=[{self.root / 'shards' / 'train'}]", f"data.tokenizer={self.root / 'tokenizer'}")
        record = self.root / "replay.json"
        if not record.exists():
            if not (self.run / "checkpoints" / f"step-{half:08d}").exists():
                train_and_kill(self.recipe, self.run, replayed[-1], *data)
            replay = self.root / "replay"
            shutil.rmtree(replay, ignore_errors=True)
            shutil.copytree(self.run, replay, ignore=shutil.ignore_patterns("wandb*"))
            newest = checkpoints(replay)[0].name
            if newest != f"step-{half:08d}":
                raise WorkError(f"{self.run}: the newest checkpoint is {newest}, expected that of step {half}; remove {self.root}")
            train_and_kill(self.recipe, replay, replayed[-1], *data, "run.wandb.mode=disabled")
            atomic_write(record, orjson.dumps({"before": exact_losses(self.run, replayed), "after": exact_losses(replay, replayed)}))
        tensor_parallel = ("parallel.tensor=2", f"batch.micro_rows={recipe.batch.global_rows}")
        launch(self.recipe, f"run.dir={self.run}", *data, *tensor_parallel).check()
        return self._trained(recipe.train.steps)

    def _trained(self, steps: int) -> dict[str, Any]:
        replay = orjson.loads((self.root / "replay.json").read_bytes())
        reports = list(RunDirectory(self.run).reports())
        return {
            "steps": steps,
            "training_minutes": sum(report.seconds for report in reports) / 60,
            "resume_identical": replay["before"] == replay["after"],
            "loss": reports[-1].loss,
        }

    def convert(self) -> dict[str, Any]:
        shutil.rmtree(self.root / "model", ignore_errors=True)  # of a demo that ended before this stage did
        return tool("convert_checkpoint", "to-hf", self.run, self.root / "model", "--codec", self.root / "codec")

    def use(self) -> dict[str, Any]:
        lines = (self.root / "corpus" / "heldout_known.jsonl").read_bytes().splitlines()
        sample = next(line for line in map(orjson.loads, lines) if "target_audio" in line)
        heard, spoken = self.root / "corpus" / sample["audio"], self.root / "answer.wav"
        generated = tool("generate", "--model", self.root / "model", "--audio", heard, "--out-audio", spoken)
        return {"audio": str(heard), "expected": sample["text"], **generated}

    def evaluate(self) -> dict[str, Any]:
        scores = {}
        for split in ("heldout_known", "heldout_unseen"):
            report = self.root / "eval" / split / "eval.json"
            where = ("--model", self.root / "model", "--shards", self.root / "shards" / split, "--report", report)
            scores[split] = tool("evaluate", *where, "--by", "kind")
        return scores

    def see(self) -> dict[str, Any]:
        evaluation = self.root / "eval" / "heldout_known" / "eval.json"
        return tool("report", self.run, "--out", self.root / "report.html", "--evaluation", evaluation)


@dataclass(frozen=True)
class Launched:
    """A training run that was started through DeepSpeed's launcher."""

    process: subprocess.Popen[bytes]
    command: str

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the launcher and all that it started: nothing gets a chance to save."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=60)

    def check(self) -> None:
        if self.process.wait():
            raise WorkError(f"exit code {self.process.returncode}: {self.command}")


def launch(recipe: Path, *overrides: str) -> Launched:
    """``deepspeed launch/train_omni.sh`` on two CPU processes of one thread each; another run on this machine does not matter."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # the launcher's own default, 29500, is every run's
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    command += ["launch/train_omni.sh", "--config", str(recipe), *overrides]
    logger.info("%s", shlex.join(command))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": _path()}
    return Launched(subprocess.Popen(command, env=environment), shlex.join(command))


def train_and_kill(recipe: Path, run: Path, step: int, *overrides: str) -> None:
    """Trains (or goes on) until ``step`` is logged, then SIGKILLs launcher and ranks.

    Raises ``WorkError`` if training ends before.
    """
    metrics = RunDirectory(run).metrics
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    launched = launch(recipe, f"run.dir={run}", *overrides)
    while launched.running:
        time.sleep(0.5)
        # the file of a resumed run holds the rows of its predecessor until it is cut to the checkpoint's step
        if metrics.exists() and metrics.stat().st_mtime_ns != before and last_step(run) >= step:
            launched.kill()
            return
    launched.check()
    raise WorkError(f"training in {run} ended at step {last_step(run)}, before step {step} at which it was to be killed")


def last_step(run: Path) -> int:
    """The newest step in the run's metrics, -1 if there is none."""
    return max((report.step for report in RunDirectory(run).reports()), default=-1)


def exact_losses(run: Path, steps: range) -> list[str]:
    """Losses and gradient norms of some steps as hexadecimal floats: equal strings are equal bits."""
    return [f"{r.loss.hex()} {r.grad_norm.hex()}" for r in RunDirectory(run).reports() if r.step in steps]


def tool(name: str, *arguments: object) -> dict[str, Any]:
    """Runs ``tools/NAME.py ... --json`` and returns its summary; its progress goes to the terminal."""
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments), "--json"]
    logger.info("%s", shlex.join(["python", *command[1:]]))
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PATH": _path()}  # small matrices: a second thread only gets in the way
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        raise WorkError(f"exit code {done.returncode}: {shlex.join(command)}")
    summary: dict[str, Any] = orjson.loads(done.stdout)
    return summary


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def demo(
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    recipe: Annotated[Path, typer.Option(help="Training recipe.")] = Path("launch/recipes/demo_cpu.yaml"),
) -> dict[str, Any]:
    """Speaks a corpus, makes shards, trains with a kill and a resume, exports, evaluates and reports."""
    job = Demo(out, recipe)
    results = {
        name: job.stage(name, work)
        for name, work in (
            ("speak", job.speak),
            ("codec", job.codec),
            ("shards", job.shards),
            ("tokenizer", job.tokenizer),
            ("rows", job.rows),
            ("train", job.train),
            ("convert", job.convert),
            ("use", job.use),
            ("evaluate", job.evaluate),
            ("see", job.see),
        )
    }
    known, unseen = (results["evaluate"][split] for split in ("heldout_known", "heldout_unseen"))
    summary = {
        "wer_heldout": {"known": known["transcribe"]["wer"], "unseen": unseen["transcribe"]["wer"]},
        "exact_match": known["answer"]["exact_match"],
        "exact_match_unseen": unseen["answer"]["exact_match"],
        "codec": known["codec"],
        "resume_identical": results["train"]["resume_identical"],
        "export_max_abs_diff": results["convert"]["max_abs_diff"],
        "training_minutes": results["train"]["training_minutes"],
        "minutes": job.minutes(),
        "report": str(out / "report.html"),
    }
    atomic_write(out / "summary.json", orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return summary


if __name__ == "__main__":
    cli.command(demo)
