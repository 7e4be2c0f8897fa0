"""Records what commands print, line by line with its timing, as an animated SVG.

    python benchmarks/recording.py docs/tail.svg 'python generate.py --workdir runs/front --prompt "…" --show-tail'

The time before a command's first line, in which Python starts and programs are compiled, is cut to a second. A viewer
that does not animate shows the last picture.
"""

import html
import os
import shlex
import subprocess
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokmat_jax.commands.flags import run_script
from tokmat_jax.errors import UserError
from tokmat_jax.view.terminal import visible

_COLUMNS, _WIDTH, _HEIGHT, _MARGIN = 100, 8.0, 18, 16
_STARTED = 1.0
_STYLE = """text { font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, monospace; fill: #e6e6e3; white-space: pre }
.asked { fill: #8fd3a4 } text { animation: shown .01s backwards } @keyframes shown { from { opacity: 0 } }
@media (prefers-reduced-motion: reduce) { text { animation: none } }"""


@dataclass(frozen=True)
class Line:
    """A line of the terminal."""

    text: str
    seconds: float
    """When it appears."""
    is_asked: bool = False
    """Whether it was typed."""


def record(command: str, begin: float) -> list[Line]:
    """What `command` prints to its standard output, if it is typed after `begin` seconds."""
    lines, clock, first = [Line(f"$ {command}", begin, is_asked=True)], time.monotonic(), None
    with subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        for text in process.stdout:
            now = time.monotonic() - clock
            first = now if first is None else first
            lines.append(Line(text.rstrip("\n"), begin + _STARTED + now - first))
    if process.returncode:
        raise UserError(f"the command ended with {process.returncode}: {command}")
    return lines


def drawn(lines: Sequence[Line]) -> str:
    """The lines as an SVG, broken at the width of the terminal."""
    parts = [(part, line) for line in lines for part in textwrap.wrap(
        visible(line.text), _COLUMNS, drop_whitespace=False, subsequent_indent="  ") or [""]]
    rows = [_row(_MARGIN + _HEIGHT * (row + 0.8), part, line) for row, (part, line) in enumerate(parts)]
    width, height = _COLUMNS * _WIDTH + 2 * _MARGIN, len(parts) * _HEIGHT + 2 * _MARGIN
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
            f'viewBox="0 0 {width:.0f} {height}"><style>{_STYLE}</style>\n'
            f'<rect width="100%" height="100%" rx="8" fill="#1b1d21"/>\n' + "\n".join(rows) + "\n</svg>\n")


def _row(y: float, text: str, line: Line) -> str:
    kind = "asked" if line.is_asked else "said"
    return (f'<text class="{kind}" x="{_MARGIN}" y="{y:.0f}" style="animation-delay: {line.seconds:.2f}s">'
            f"{html.escape(text)}</text>")


def main(args: Sequence[str]) -> None:
    """Runs the commands one after the other, and writes the picture."""
    if len(args) < 2:
        raise UserError("give the SVG to write, and at least one command in quotes")
    lines: list[Line] = []
    for command in args[1:]:
        lines += record(command, lines[-1].seconds + 1.0 if lines else 0.0)
        print(f"{command}: {len(lines)} lines, {lines[-1].seconds:.1f} s")
    Path(args[0]).write_text(drawn(lines), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
