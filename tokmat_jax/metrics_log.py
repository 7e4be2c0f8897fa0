"""Rows of numbers as JSON lines and TensorBoard. A resumed run takes back the rows it is going to write again."""

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of one JSON object per line, each with a `step`; rows after `resume_step` are dropped when it opens."""

    def __init__(self, path: Path, resume_step: int):
        kept = [line for line in _lines(path) if _step(line) <= resume_step]
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(unfinished, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # the last line of a killed run
        return float("inf")


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/` of a workdir."""

    def __init__(self, workdir: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        self._rows = JsonLines(workdir / "metrics.jsonl", resume_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, prefix: str, metrics: dict[str, float]) -> None:
        """One row: the names get `prefix/` before them."""
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._rows.write({"step": step, **named})
        for name, value in named.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._rows.close()
        self._board.close()
