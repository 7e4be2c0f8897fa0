"""Small real runs through `train.py`, made once per session."""

import contextlib
import io
from pathlib import Path

import jax

import checkpoints
from tokmat_jax.commands import train
from tokmat_jax.hf.convert import import_weights

WORDS = ["the cat sat on the mat", "a dog ran to the sea", "the sea is not a cat", "who sat by the sea?"]


def write_corpus(folder: Path) -> Path:
    """A text file of 60 documents."""
    documents = [". ".join(WORDS[(index * 7 + line) % 4] for line in range(4 + index % 5)) for index in range(60)]
    path = folder / "corpus.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    """Flags of a tiny run called `name` on the corpus of `folder`."""
    flags = {
        "workdir": folder / name, "data.source": f"files:{folder}/corpus.txt", "data.seq-len": 48,
        "data.holdout": 0.2, "data.prepared-dir": folder / "prepared", "tokenizer.vocab-size": 290,
        "model.embed-dim": 16, "model.num-layers": 2, "model.num-heads": 2, "train.batch-size": 4,
        "train.num-steps": 6, "train.log-every": 2, "train.eval-every": 3, "train.eval-batches": 2,
        "train.sample-every": 6, "train.num-samples": 1, "train.checkpoint-every": 3, "optimizer.warmup-steps": 1,
        "generation.tail-length": 4, "generation.max-new-tokens": 8, "mesh.data": 4,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + list(more)


def imported(folder: Path, **more: object) -> list[str]:
    """Makes a corpus and the `import` of a tiny Llama in `folder`; returns flags of runs that start from it, `more` of
    them by dotted name."""
    write_corpus(folder)
    (folder / "hf").mkdir()
    import_weights(str(checkpoints.write(folder / "hf")), folder / "import")
    flags = {"init-from": folder / "import", "data.source": f"files:{folder}/corpus.txt", "data.seq-len": 48,
             "data.holdout": 0.2, "data.prepared-dir": folder / "prepared", "train.batch-size": 4, "mesh.data": 4,
             "train.num-samples": 0} | more
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def go(*flags: str) -> str:
    """Trains in this process; returns what it printed."""
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(flags)
    return printed.getvalue()


def run(folder: Path, name: str, *more: str) -> Path:
    """Trains it; returns its workdir."""
    with jax.numpy_dtype_promotion("standard"):
        train.main(arguments(folder, name, *more))
    return folder / name
