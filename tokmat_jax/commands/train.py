"""Train a model: python train.py --config configs/quickstart.py [--section.field value …]

Running the same command again resumes, on any other number of devices and processes too. Reads top to bottom: cluster,
mesh, corpus, state, loop. Of several processes the first one prints and writes.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.sharding import Mesh

from tokmat_jax.commands.flags import parse_run
from tokmat_jax.config import Config
from tokmat_jax.config.saved import check_same_run
from tokmat_jax.data.corpus import Corpus, corpus_of_run, prepare
from tokmat_jax.data.loader import train_batches
from tokmat_jax.distributed.mesh import make_mesh, process_rows
from tokmat_jax.distributed.processes import (
    check_fits,
    is_first,
    join_cluster,
    leave_broken_cluster,
    on_first,
    use_compilation_cache,
)
from tokmat_jax.errors import UserError, one_line
from tokmat_jax.keys import seed_key
from tokmat_jax.model.lora import split_params
from tokmat_jax.progress import bar
from tokmat_jax.storage.checkpoint import open_checkpoints
from tokmat_jax.storage.files import write_json
from tokmat_jax.storage.model import load_base, save_base
from tokmat_jax.storage.npy import open_npy
from tokmat_jax.storage.plain_path import plain_path
from tokmat_jax.storage.workdir import (
    CONFIG,
    CORPUS,
    IMPORTED,
    TOKENIZER,
    load_config,
    lock_workdir,
    make_workdir,
    refuse_links,
    save_config,
)
from tokmat_jax.training.loop import Loop
from tokmat_jax.training.start_from import starting_params
from tokmat_jax.training.step import make_train_functions
from tokmat_jax.training.stopping import stop_signals
from tokmat_jax.training.throughput import flops_per_token


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
    config, followed = parse_run(args)
    join_cluster(config.cluster)
    use_compilation_cache(config.compute)
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    with on_first(lambda: open_workdir(Path(config.workdir))) or contextlib.nullcontext():
        if followed:
            chosen = ", ".join(f"{name} {value}" for name, value in followed.items())
            say(f"from {config.init_from}: {chosen}; give a flag to choose otherwise")
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
                params, of_source, mark = starting_params(state.whole, corpus.windows("train"), corpus.tokenizer,
                                                          config, mesh)
                trained, frozen = split_params(params, config)
                state = dataclasses.replace(state, params=trained, frozen=frozen)
                if frozen:
                    on_first(lambda: save_base(workdir, config, mark))
                say(f"starting from {config.init_from} ({of_source.objective.kind})")
        else:
            state, position = checkpoints.restore(functions.shapes)
            if not config.trains_all:
                frozen = load_base(workdir, config, functions.shapes.frozen, vocab_size, mesh)
                state = dataclasses.replace(state, frozen=frozen)
            batches.seek(position)
            for late in sorted(set(config.train.skip_batches) - known):
                if late < position:
                    say(f"train.skip_batches: batch {late} has been learned from before step {int(state.step):,}; to "
                        f"leave it out, move the checkpoints behind it away")
            say(f"{workdir}: resuming after step {int(state.step):,}")
        size, trained = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.whole, state.params))
        share = "" if config.trains_all else f", of which {trained:,} are trained"
        say(f"{config.objective.kind} objective, {size:,} parameters{share}, "
            f"{flops_per_token(config, vocab_size) / 1e6:,.1f} MFLOP per token, mesh {dict(mesh.shape)}, "
            f"{config.train.num_steps:,} steps of "
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
