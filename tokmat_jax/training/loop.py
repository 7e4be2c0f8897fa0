"""The loop of a run: updates, and what happens in between (metrics, validation, samples, checkpoints, spikes)."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from tokmat_jax.config import Config, MeshConfig, OptimizerConfig
from tokmat_jax.data.corpus import Corpus
from tokmat_jax.data.loader import Batches, validation_batches
from tokmat_jax.distributed.mesh import make_mesh, put_rows, put_whole
from tokmat_jax.distributed.processes import is_first
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.model.backbone import Params
from tokmat_jax.model.params import TrainState
from tokmat_jax.progress import Bar
from tokmat_jax.storage.checkpoint import Checkpoints
from tokmat_jax.training.climbing import WINDOW, ClimbWatch
from tokmat_jax.training.metrics_log import JsonLines, MetricsLog
from tokmat_jax.training.spikes import LossWatch
from tokmat_jax.training.step import TrainFunctions, eval_means
from tokmat_jax.training.stopping import Stop
from tokmat_jax.training.throughput import measures, memory
from tokmat_jax.view.terminal import tail_text


class Stopwatch:
    """Steps per second since `step`, with what is not training left out."""

    def __init__(self, step: int):
        self._step, self._begin = step, time.monotonic()

    def rate(self, step: int) -> float | None:
        """None where no step has been timed."""
        return (step - self._step) / (time.monotonic() - self._begin) if step > self._step else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        pause = time.monotonic()
        yield
        self._begin += time.monotonic() - pause


class Tracing:
    """The trace of the steps that `train.profile` names, in `folder`."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._running = steps, folder, False

    def before(self, step: int) -> None:
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class Loop:
    """One run from its first or latest step to its last."""

    def __init__(self, config: Config, workdir: Path, corpus: Corpus, functions: TrainFunctions, state: TrainState,
                 progress: Bar, mesh: Mesh):
        self.config, self.workdir, self.corpus, self.functions = config, workdir, corpus, functions
        self.state, self.progress, self.mesh = state, progress, mesh
        self.unigram = put_whole(corpus.unigram(), mesh)
        kept = int(state.step) or -1  # a run that begins again validates step 0 again
        self.log = MetricsLog(workdir, kept) if is_first() else None
        self.samples = JsonLines(workdir / "samples.jsonl", kept) if is_first() else None
        self.spikes = JsonLines(workdir / "spikes.jsonl", kept) if is_first() else None
        self.watch, self.climb, self.skipped_in_a_row = LossWatch(), ClimbWatch(), 0
        self.tracing = Tracing(config.train.profile if is_first() else None, workdir / "profile")
        self.generator: Generator | None = None

    def run(self, batches: Batches, rows: slice, checkpoints: Checkpoints, stop: Stop) -> int:
        """Updates until `num_steps` or `stop`, with everything that happens in between; returns the exit code."""
        train = self.config.train
        waiting: list[tuple[int, dict[str, jax.Array]]] = []
        first = int(self.state.step) + 1
        if first == 1 and self.config.init_from is not None:
            self.validate(0)  # what the other model is worth here, before anything is learned
        watch = Stopwatch(first - 1)
        for step in range(first, train.num_steps + 1):
            self.tracing.before(step)
            ids = put_rows(next(batches), rows, train.batch_size, self.mesh)
            self.state, metrics = self.functions.step(self.state, ids, self.unigram)
            waiting.append((batches.position - 1, metrics))
            self.tracing.after(step, metrics)
            if step == first:  # the time to compile is not the speed of training
                jax.block_until_ready(metrics)
                watch = Stopwatch(step)
            code = stop.after(step)
            last = step == train.num_steps
            if logged := last or code or step % train.log_every == 0 or step % train.checkpoint_every == 0:
                means = self._means(waiting, step, checkpoints)
                if (steps_per_second := watch.rate(step)) is not None:
                    means |= measures(self.config, self.corpus.tokenizer.vocab_size, steps_per_second)
                self._write(step, "train", means | memory())
                self.progress.update(step, f"loss {means.get('loss', np.nan):.3f}{speed(means)}")
                waiting, watch = [], Stopwatch(step)
            with watch.paused():
                if code and not last:  # the time that is left may be short
                    checkpoints.finish(self.state, batches.position)
                if last or step % train.eval_every == 0:
                    self.validate(step)
                if last or step % train.sample_every == 0:
                    self.show_samples(step)
                # Last, so that a run that dies here does all of this step again.
                if last:
                    checkpoints.finish(self.state, batches.position)
                if last or code:
                    return 0 if last else code or 0
                if step % train.checkpoint_every == 0 or (logged and checkpoints.due()):
                    checkpoints.save(self.state, batches.position)
        return 0

    def _means(self, waiting: list[tuple[int, dict[str, jax.Array]]], step: int,
               checkpoints: Checkpoints) -> dict[str, float]:
        """Means over the steps that were not skipped, whose number is `skipped`."""
        rows = jax.device_get([metrics for _, metrics in waiting])
        good = [row for row in rows if not row["skipped"]]
        for number, (position, _), row in zip(range(step - len(rows) + 1, step + 1), waiting, rows, strict=True):
            self._look_at(number, position, row, checkpoints)
        means = {name: float(np.mean([row[name] for row in good])) for name in rows[0] if good}
        return means | {"skipped": float(len(rows) - len(good))}

    def _look_at(self, step: int, position: int, row: dict[str, np.ndarray], checkpoints: Checkpoints) -> None:
        """Notes a step that was skipped or whose loss stands out; raises UserError where too many were skipped."""
        loss, skipped = float(row["loss"]), bool(row["skipped"])
        expected = self.watch.expected(loss)
        if not skipped and (climbed := self.climb.climbed(loss)) is not None:
            self.progress.print(climb_warning(step, *climbed, self.config.optimizer))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped and expected is None:
            return
        numbers = {name: float(row[name]) for name in ("loss", "grad_norm", "param_norm")}
        what = f"loss {loss:.3f}, expected {expected:.3f}" if expected is not None else ", ".join(
            f"{name} is {value}" for name, value in numbers.items() if not np.isfinite(value))
        self.progress.print(f"step {step}{', skipped' * skipped}: {what}; the batch is at position {position}")
        if self.spikes is not None:
            finite = {name: value if np.isfinite(value) else str(value) for name, value in numbers.items()}
            self.spikes.write({"step": step, "position": position, "skipped": skipped, "expected": expected, **finite})
        if self.skipped_in_a_row > self.config.train.max_skipped:
            raise UserError(f"{what} at step {step} ({self.skipped_in_a_row} skipped in a row); "
                            f"{checkpoints.newest()} in {self.workdir}: lower the learning rate or "
                            f"--optimizer.clip-norm, in a new --workdir")

    def validate(self, step: int) -> None:
        """Loss terms and accuracy on the held-out split."""
        train = self.config.train
        totals: dict[str, float] = {}
        windows = self.corpus.windows("validation")
        # As many rows at a time as a micro-batch has: what fits in training fits here.
        rows, count = train.batch_size // train.accumulation, train.eval_batches * train.accumulation
        for index, ids in enumerate(validation_batches(windows, rows, count)):
            batch, number = put_rows(ids, slice(0, rows), rows, self.mesh), put_whole(np.asarray(index), self.mesh)
            sums = jax.device_get(self.functions.evaluate(self.state.whole, batch, self.unigram, number))
            totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
        means = eval_means(totals)
        self._write(step, "validation", means)
        shown = ("mse", "info_nce", "perplexity", "top1/maturity_1", "top5/maturity_1")
        self.progress.print(f"step {step} validation  " + "  ".join(
            f"{name.removesuffix('/maturity_1')} {means[name]:.3f}" for name in shown if name in means))

    def show_samples(self, step: int) -> None:
        """Continues the beginnings of held-out windows and prints them with their tail."""
        if self.config.train.num_samples == 0:
            return
        params, here = self.state.whole, self.mesh
        if jax.process_count() > 1:
            # The first process writes alone, so it needs all of them.
            params, here = process_allgather(params, tiled=True), make_mesh(MeshConfig(), jax.local_devices()[:1])
        if self.samples is not None:
            with jax.set_mesh(here):
                self._write_samples(step, params, self.samples)

    def _write_samples(self, step: int, params: Params, out: JsonLines) -> None:
        if self.generator is None:
            self.generator = Generator(self.config, params, self.corpus.tokenizer)
        self.generator.set_params(params)
        windows = self.corpus.windows("validation")
        settings = self.generator.settings
        room = self.config.max_positions - settings.tail_length
        length = min(12, self.config.data.seq_len // 4, room - 1)
        settings = dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens, room - length))
        for number in range(self.config.train.num_samples):
            ids = windows[number % len(windows)]["tokens"][:length].tolist()
            moment = list(self.generator.stream(ids, settings))[-1]
            prompt, _ = self.corpus.tokenizer.split(ids, moment.tokens)
            self.progress.print(tail_text(prompt, moment, self.corpus.tokenizer))
            out.write({"step": step, "prompt": prompt, "text": moment.text})

    def _write(self, step: int, prefix: str, means: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(step, prefix, means)

    def close(self) -> None:
        self.tracing.close()
        for file in (self.log, self.samples, self.spikes):
            if file is not None:
                file.close()


def climb_warning(step: int, first: float, last: float, optimizer: OptimizerConfig) -> str:
    """The line that says that the loss has climbed from `first` to `last`, and what to do."""
    rates = f"--optimizer.learning-rate (now {optimizer.learning_rate:g})"
    if optimizer.name == "muon":
        rates += f" and --optimizer.muon-learning-rate (now {optimizer.muon_learning_rate:g})"
    return (f"warning: step {step}: the loss climbs: {last:.3f} over the last {WINDOW} steps, {first:.3f} over the "
            f"first {WINDOW}; lower {rates}, in a new --workdir")


def speed(means: dict[str, float]) -> str:
    """What the progress line says of it; nothing before a step has been timed."""
    if "tokens_per_second" not in means:
        return ""
    share = f" · {100 * means['mfu']:.1f} % of the peak" if "mfu" in means else ""
    return f" · {means['tokens_per_second']:,.0f} tokens/s{share}"
