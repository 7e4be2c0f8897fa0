"""Train a model: python train.py --config configs/quickstart.py [--section.field value …]

Running the same command again resumes. Reads top to bottom: corpus, mesh, state, loop.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from tokmat_jax.checkpoint import Checkpoints, open_checkpoints
from tokmat_jax.cli import parse_config, run_script
from tokmat_jax.config import Config
from tokmat_jax.data.loader import train_batches, validation_batches
from tokmat_jax.data.prepare import Corpus, prepare
from tokmat_jax.errors import UserError
from tokmat_jax.generator import Generator
from tokmat_jax.init_from import begin, load_source
from tokmat_jax.metrics_log import JsonLines, MetricsLog
from tokmat_jax.sharding import batch_sharding, make_mesh
from tokmat_jax.train_step import TrainFunctions, TrainState, eval_means, make_train_functions
from tokmat_jax.view.progress import Bar, bar
from tokmat_jax.view.terminal import tail_text
from tokmat_jax.workdir import (
    CONFIG,
    IMPORTED,
    TOKENIZER,
    check_same_run,
    keep_corpus,
    load_config,
    make_workdir,
    save_config,
)


def open_workdir(config: Config) -> Path:
    """The run's folder; an existing one must hold the same run."""
    workdir = Path(config.workdir)
    make_workdir(workdir)
    if (workdir / IMPORTED).exists():
        raise UserError(f"{workdir} holds imported weights, which training would replace: start from them with "
                        f"--init-from {workdir} and another --workdir")
    if (workdir / CONFIG).exists():
        for name, (before, after) in check_same_run(load_config(workdir), config).items():
            print(f"{workdir}: {name} {before!r} → {after!r}")
    return workdir


def initial_table(config: Config, vocab_size: int) -> np.ndarray | None:
    """The rows that `table.initial` names, checked."""
    if config.table.initial is None:
        return None
    expected = (vocab_size, config.model.embed_dim)
    try:
        rows = np.lib.format.open_memmap(config.table.initial, "r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"table.initial: cannot read {config.table.initial!r}: {error}") from None
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


class Loop:
    """One run from its first or latest step to its last."""

    def __init__(self, config: Config, workdir: Path, corpus: Corpus, functions: TrainFunctions, state: TrainState,
                 progress: Bar):
        self.config, self.workdir, self.corpus, self.functions = config, workdir, corpus, functions
        self.state, self.progress = state, progress
        self.unigram = corpus.unigram()
        self.log = MetricsLog(workdir, int(state.step))
        self.samples = JsonLines(workdir / "samples.jsonl", int(state.step))
        self.generator: Generator | None = None

    def run(self, batches, rows: jax.sharding.NamedSharding, checkpoints: Checkpoints) -> None:
        """Updates until `num_steps`, with everything that happens in between."""
        train = self.config.train
        waiting: list[dict[str, jax.Array]] = []
        first = int(self.state.step) + 1
        watch = Stopwatch(first - 1)
        for step in range(first, train.num_steps + 1):
            ids = jax.make_array_from_process_local_data(rows, next(batches))
            self.state, metrics = self.functions.step(self.state, ids, self.unigram)
            waiting.append(metrics)
            if step == first:  # the time to compile is not the speed of training
                jax.block_until_ready(metrics)
                watch = Stopwatch(step)
            last = step == train.num_steps
            if last or step % train.log_every == 0 or step % train.checkpoint_every == 0:
                means = self._means(waiting, step, checkpoints)
                if (steps_per_second := watch.rate(step)) is not None:
                    means["tokens_per_second"] = steps_per_second * train.batch_size * self.config.data.seq_len
                self.log.write(step, "train", means)
                speed = f" · {means['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in means else ""
                self.progress.update(step, f"loss {means['loss']:.3f}{speed}")
                waiting, watch = [], Stopwatch(step)
            with watch.paused():
                if last or step % train.eval_every == 0:
                    self.validate(step)
                if last or step % train.sample_every == 0:
                    self.show_samples(step)
                # Last, so that a run that is stopped here does all of this step again.
                if last or step % train.checkpoint_every == 0:
                    checkpoints.save(self.state, batches)

    def _means(self, waiting: list[dict[str, jax.Array]], step: int, checkpoints: Checkpoints) -> dict[str, float]:
        rows = jax.device_get(waiting)
        for number, row in enumerate(rows, step - len(rows) + 1):
            for name in ("loss", "grad_norm", "param_norm"):
                if not np.isfinite(row[name]):
                    checkpoints.wait()
                    good = checkpoints.latest_step()
                    where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
                    raise UserError(f"{name} is {row[name]} at step {number}; {where} in {self.workdir}: lower the "
                                    f"learning rate or --optimizer.clip-norm, in a new --workdir")
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def validate(self, step: int) -> None:
        """Loss terms and accuracy on the held-out split."""
        train = self.config.train
        totals: dict[str, float] = {}
        windows = self.corpus.windows("validation")
        # As many rows at a time as a micro-batch has: what fits in training fits here.
        rows, count = train.batch_size // train.accumulation, train.eval_batches * train.accumulation
        for index, ids in enumerate(validation_batches(windows, rows, count)):
            sums = jax.device_get(self.functions.evaluate(self.state.params, ids, self.unigram, index))
            totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
        means = eval_means(totals)
        self.log.write(step, "validation", means)
        shown = ("mse", "info_nce", "perplexity", "top1/maturity_1", "top5/maturity_1")
        self.progress.print(f"step {step} validation  " + "  ".join(
            f"{name.removesuffix('/maturity_1')} {means[name]:.3f}" for name in shown if name in means))

    def show_samples(self, step: int) -> None:
        """Continues the beginnings of held-out windows and prints them with their tail."""
        if self.config.train.num_samples == 0:
            return
        if self.generator is None:
            self.generator = Generator(self.config, self.state.params, self.corpus.tokenizer)
        self.generator.set_params(self.state.params)
        windows = self.corpus.windows("validation")
        settings = self.generator.settings
        room = self.config.max_positions - settings.tail_length
        length = min(12, self.config.data.seq_len // 4, room - 1)
        settings = dataclasses.replace(settings, max_new_tokens=min(settings.max_new_tokens, room - length))
        for number in range(self.config.train.num_samples):
            ids = windows[number % len(windows)]["tokens"][:length].tolist()
            prompt = self.corpus.tokenizer.decode(ids)
            moment = list(self.generator.stream(ids, settings))[-1]
            self.progress.print(tail_text(prompt, moment, self.corpus.tokenizer))
            self.samples.write({"step": step, "prompt": prompt, "text": moment.text})

    def close(self) -> None:
        self.log.close()
        self.samples.close()


def main(args: Sequence[str]) -> None:
    """Trains the run that `args` describe, from the start or from its newest checkpoint."""
    config = parse_config(args)
    workdir = open_workdir(config)
    mesh = make_mesh(config.mesh)
    rows = batch_sharding(mesh)
    micro_batch, split = config.train.batch_size // config.train.accumulation, mesh.shape["data"] * mesh.shape["fsdp"]
    if micro_batch % split:
        raise UserError(f"train.batch_size / train.accumulation = {micro_batch} does not split over the {split} "
                        f"devices of data × fsdp")
    corpus = prepare(config)
    keep_corpus(corpus.facts, workdir)
    save_config(config, workdir)
    corpus.tokenizer.save(workdir / TOKENIZER)
    facts = corpus.facts
    print(f"corpus {corpus.folder}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, vocabulary "
          f"{corpus.tokenizer.vocab_size:,}; {facts['train_windows']:,} windows of {facts['seq_len']} to train on, "
          f"{facts['validation_windows']:,} held out")

    batches = train_batches(corpus.windows("train"), config.train.batch_size // jax.process_count(), config.train.seed,
                            jax.process_index(), jax.process_count())
    with jax.set_mesh(mesh), open_checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
        functions = make_train_functions(config, corpus.tokenizer.vocab_size, mesh)
        if checkpoints.latest_step() is None:
            table = initial_table(config, corpus.tokenizer.vocab_size)
            state = functions.init(jax.random.key(config.train.seed), table)
            if config.init_from is not None:
                source, of_source = load_source(config, corpus.tokenizer, mesh)
                windows = corpus.windows("train")
                ids = np.stack([windows[index]["tokens"] for index in range(min(4, len(windows)))])
                placed = jax.tree.map(lambda s: s.sharding, functions.shapes.params)
                start = jax.jit(begin, static_argnums=(3, 4), out_shardings=placed)
                state = dataclasses.replace(state, params=start(source, state.params, ids, of_source, config))
                print(f"starting from {config.init_from} ({of_source.objective.kind})")
        else:
            state = checkpoints.restore(functions.shapes, batches)
            print(f"{workdir}: resuming after step {int(state.step):,}")
        size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        print(f"{config.objective.kind} objective, {size:,} parameters, mesh {dict(mesh.shape)}, "
              f"{config.train.num_steps:,} steps of {config.train.batch_size} × {config.data.seq_len} tokens")
        with bar("training", config.train.num_steps, int(state.step)) as progress:
            loop = Loop(config, workdir, corpus, functions, state, progress)
            try:
                loop.run(batches, rows, checkpoints)
            finally:
                loop.close()
    print(f'done: python generate.py --workdir {workdir} --prompt "…"')


if __name__ == "__main__":
    run_script(main)
