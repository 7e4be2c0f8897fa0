"""Train a model: python train.py --config configs/quickstart.py [--section.field value …]

Running the same command again resumes, on any other number of devices and processes too. Reads top to bottom: cluster,
mesh, corpus, state, loop. Of several processes the first one prints and writes.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from tokmat_jax.commands.flags import parse_config
from tokmat_jax.config import Config, MeshConfig
from tokmat_jax.data.corpus import Corpus, corpus_of_run, prepare
from tokmat_jax.data.loader import Batches, train_batches, validation_batches
from tokmat_jax.distributed.mesh import make_mesh, process_rows, put_rows, put_whole
from tokmat_jax.distributed.processes import (
    check_fits,
    is_first,
    join_cluster,
    leave_broken_cluster,
    on_first,
    use_compilation_cache,
)
from tokmat_jax.errors import UserError, one_line
from tokmat_jax.generation.generator import Generator
from tokmat_jax.keys import seed_key
from tokmat_jax.model.backbone import Params
from tokmat_jax.model.params import TrainState
from tokmat_jax.progress import Bar, bar
from tokmat_jax.storage.checkpoint import Checkpoints, open_checkpoints
from tokmat_jax.storage.files import write_json
from tokmat_jax.storage.npy import open_npy
from tokmat_jax.storage.plain_path import plain_path
from tokmat_jax.storage.workdir import (
    CONFIG,
    CORPUS,
    IMPORTED,
    TOKENIZER,
    check_same_run,
    load_config,
    lock_workdir,
    make_workdir,
    refuse_links,
    save_config,
)
from tokmat_jax.training.metrics_log import JsonLines, MetricsLog
from tokmat_jax.training.spikes import LossWatch
from tokmat_jax.training.start_from import begin, load_source
from tokmat_jax.training.step import TrainFunctions, eval_means, make_train_functions
from tokmat_jax.training.stopping import Stop, stop_signals
from tokmat_jax.training.throughput import flops_per_token, measures, memory
from tokmat_jax.view.terminal import tail_text


def open_workdir(workdir: Path) -> IO[str]:
    """Makes the run's folder and locks it until the file that is returned is closed."""
    make_workdir(workdir)
    plain_path(workdir)  # refused before anything is done
    if (workdir / IMPORTED).exists():
        raise UserError(f"{workdir} holds imported weights, which training would replace: start from them with "
                        f"--init-from {workdir} and another --workdir")
    refuse_links(workdir)
    return lock_workdir(workdir)


def check_workdir(config: Config) -> None:
    """Raises UserError where the run's folder holds anything but this run."""
    workdir = Path(config.workdir)
    if (workdir / CONFIG).exists():
        for name, (before, after) in check_same_run(load_config(workdir), config).items():
            print(f"{workdir}: {name} {before!r} → {after!r}")


def initial_table(config: Config, vocab_size: int) -> np.ndarray | None:
    """The rows that `table.initial` names, checked."""
    if config.table.initial is None:
        return None
    expected = (vocab_size, config.model.embed_dim)
    try:
        rows = open_npy(config.table.initial)
    except UserError as error:
        raise UserError(f"table.initial: {error}") from None
    floats = np.issubdtype(rows.dtype, np.floating)
    if rows.shape != expected or not floats or not np.isfinite(rows).all() or not np.any(rows, axis=-1).all():
        raise UserError(f"table.initial: {config.table.initial!r} is {rows.dtype} {rows.shape}, "
                        f"expected finite floats {expected} without a row of zeros")
    return rows.astype(np.float32)


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
        self.log = MetricsLog(workdir, int(state.step)) if is_first() else None
        self.samples = JsonLines(workdir / "samples.jsonl", int(state.step)) if is_first() else None
        self.spikes = JsonLines(workdir / "spikes.jsonl", int(state.step)) if is_first() else None
        self.watch, self.skipped_in_a_row = LossWatch(), 0
        self.tracing = Tracing(config.train.profile if is_first() else None, workdir / "profile")
        self.generator: Generator | None = None

    def run(self, batches: Batches, rows: slice, checkpoints: Checkpoints, stop: Stop) -> int:
        """Updates until `num_steps` or `stop`, with everything that happens in between; returns the exit code."""
        train = self.config.train
        waiting: list[tuple[int, dict[str, jax.Array]]] = []
        first = int(self.state.step) + 1
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
            sums = jax.device_get(self.functions.evaluate(self.state.params, batch, self.unigram, number))
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
        params, here = self.state.params, self.mesh
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


def speed(means: dict[str, float]) -> str:
    """What the progress line says of it; nothing before a step has been timed."""
    if "tokens_per_second" not in means:
        return ""
    share = f" · {100 * means['mfu']:.1f} % of the peak" if "mfu" in means else ""
    return f" · {means['tokens_per_second']:,.0f} tokens/s{share}"


def say(*parts: object) -> None:
    """Prints, in the first process."""
    if is_first():
        print(*parts)


def keep(config: Config, corpus: Corpus, workdir: Path) -> None:
    """Writes what a run needs besides its checkpoints."""
    try:
        write_json(workdir / CORPUS, corpus.facts)
        save_config(config, workdir)
        corpus.tokenizer.save(workdir / TOKENIZER)
    except OSError as error:
        raise UserError(f"--workdir: cannot write into {workdir}: {error.strerror}") from None


def main(args: Sequence[str]) -> None:
    """Trains the run that `args` describe, from the start or from its newest checkpoint."""
    config = parse_config(args)
    join_cluster(config.cluster)
    use_compilation_cache(config.compute)
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    with on_first(lambda: open_workdir(Path(config.workdir))) or contextlib.nullcontext():
        code = run(config, mesh)
    if code:
        sys.exit(code)


def run(config: Config, mesh: Mesh) -> int:
    """The run of `config` on `mesh`, in a locked workdir; returns the exit code."""
    workdir = Path(config.workdir)
    known = set(load_config(workdir).train.skip_batches) if (workdir / CONFIG).exists() else set()
    on_first(lambda: check_workdir(config))
    corpus = on_first(
        lambda: corpus_of_run(config, workdir) if (workdir / CORPUS).exists() else prepare(config)) or prepare(config)
    on_first(lambda: keep(config, corpus, workdir))
    facts, vocab_size = corpus.facts, corpus.tokenizer.vocab_size
    say(f"corpus {corpus.folder}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, vocabulary "
        f"{vocab_size:,}; {facts['train_windows']:,} windows of {facts['seq_len']} to train on, "
        f"{facts['validation_windows']:,} held out")

    rows = process_rows(mesh, config.train.batch_size)
    batches = train_batches(corpus.windows("train"), config.train.batch_size, config.train.seed, rows,
                            config.train.skip_batches)
    with jax.set_mesh(mesh), open_checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        functions = make_train_functions(config, vocab_size, mesh)
        if checkpoints.latest_step() is None:
            table = initial_table(config, vocab_size)
            state = functions.init(seed_key(config.train.seed), table)
            if config.init_from is not None:
                source, of_source = load_source(config, corpus.tokenizer, mesh)
                windows = corpus.windows("train")
                ids = np.stack([windows[index]["tokens"] for index in range(min(4, len(windows)))])
                placed = jax.tree.map(lambda s: s.sharding, functions.shapes.params)
                start = jax.jit(begin, static_argnums=(3, 4), out_shardings=placed)
                state = dataclasses.replace(state, params=start(source, state.params, ids, of_source, config))
                say(f"starting from {config.init_from} ({of_source.objective.kind})")
        else:
            state, position = checkpoints.restore(functions.shapes)
            batches.seek(position)
            for late in sorted(set(config.train.skip_batches) - known):
                if late < position:
                    say(f"train.skip_batches: batch {late} has been learned from before step {int(state.step):,}; to "
                        f"leave it out, move the checkpoints behind it away")
            say(f"{workdir}: resuming after step {int(state.step):,}")
        size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        say(f"{config.objective.kind} objective, {size:,} parameters, {flops_per_token(config, vocab_size) / 1e6:,.1f} "
            f"MFLOP per token, mesh {dict(mesh.shape)}, {config.train.num_steps:,} steps of "
            f"{config.train.batch_size} × {config.data.seq_len} tokens")
        with bar("training", config.train.num_steps, int(state.step), is_first()) as progress, stop_signals() as stop:
            loop = Loop(config, workdir, corpus, functions, state, progress, mesh)
            try:
                code = loop.run(batches, rows, checkpoints, stop)
            except (jax.errors.JaxRuntimeError, OSError) as error:
                if jax.process_count() == 1:
                    raise
                leave_broken_cluster(f"has lost the others ({one_line(error)})")
            finally:
                loop.close()
        step = int(loop.state.step)
    if code:
        say(f"stopped: step {step:,} is saved; the same command goes on from there")
    else:
        say(f'done: python generate.py --workdir {workdir} --prompt "…"')
    return code
