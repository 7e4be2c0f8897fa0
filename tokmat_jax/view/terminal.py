"""The liquid tail in a terminal: committed text, followed by the current nearest tokens of the slots, fading out."""

import itertools
import sys
import unicodedata
from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokmat_jax.data.tokenizer import Tokenizer
from tokmat_jax.generation.samples import Moment

_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_COMMITTED, _QUIET = "default", "grey50"
_GREY, _ACCENT = (128, 128, 128), (0, 150, 160)
_BLOCKS = "▁▂▃▄▅▆▇█"


def visible(text: str) -> str:
    """`text` without characters that a terminal would execute instead of showing: control characters (except new lines
    and tabs) and characters that change the writing direction."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _commands(c) else c for c in text)


def _commands(c: str) -> bool:
    return (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in _DIRECTIONS


def tail_text(prompt: str, moment: Moment, tokenizer: Tokenizer) -> Text:
    """Prompt in bold, committed text, and the tail between bars: `In the beginning was│ the│ Lord│`.

    Tokens committed by this step are underlined; a slot's colour fades with its maturity. If the step rejected a draft,
    the first rejected draft is shown at the end, after a cross.
    """
    text = Text()
    text.append(visible(prompt), "bold")
    before = len(moment.tokens) - moment.committed
    new = tokenizer.split(moment.tokens[:before], moment.tokens[before:])[1] if before else moment.text
    new = new if moment.text.endswith(new) else ""
    text.append(visible(moment.text[: len(moment.text) - len(new)]), _COMMITTED)
    text.append(visible(new), "underline")
    for token, maturity in zip(moment.tail, moment.maturity[moment.committed :], strict=True):
        text.append("│", _QUIET)
        text.append(visible(tokenizer.piece(token)).replace("\n", "⏎"), _tint(maturity))
    text.append("│" if moment.tail else "", _QUIET)
    # A draft that the budget cut off is the token that was committed last.
    for draft in moment.drafts[moment.committed - 1 : moment.committed]:
        if draft not in (-1, moment.tokens[-1]):
            text.append(" ✗" + visible(tokenizer.piece(draft)).replace("\n", "⏎"), _QUIET)
    return text


def _tint(maturity: float) -> str:
    """Colour from grey at maturity 0 to the accent at 1; both are readable on light and dark backgrounds."""
    mixed = (round(grey + maturity * (accent - grey)) for grey, accent in zip(_GREY, _ACCENT, strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def gauges(moment: Moment) -> Text:
    """Three lines about the latest step: a bar per slot, front first, for maturity, entropy and movement."""
    lines = [f"{len(moment.tokens)} tokens" + (f", {moment.committed} at once" if moment.committed > 1 else "")]
    for name, values, unit in (("maturity", moment.maturity, ""), ("entropy", moment.entropy, " nats"),
                               ("movement", moment.movement, " R")):
        lines.append(f"{name:9}{sparkline(values)} front {values[0]:.2f}, {min(values):.2f}–{max(values):.2f}{unit}")
    return Text("\n".join(lines), _QUIET)


def sparkline(values: Sequence[float]) -> str:
    """A block per value, scaled from the smallest to the largest value; all of middle height if the values are
    equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), 1.0):
        return _BLOCKS[3] * len(values)
    return "".join(_BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1))] for value in values)


def show_tails(
    prompt: str, runs: Sequence[tuple[str, Iterable[Moment]]], tokenizer: Tokenizer
) -> list[list[Moment]]:
    """Draws every step of one run, or of several side by side, each given as (title, moments). A terminal is updated in
    place; otherwise each step and run gets a line. Returns all moments of each run."""
    console = Console(soft_wrap=True, highlight=False)
    seen: list[list[Moment]] = [[] for _ in runs]
    steps = itertools.zip_longest(*(moments for _, moments in runs))
    titles = [title for title, _ in runs]
    if not console.is_terminal:
        for moments in steps:
            for title, moment, before in zip(titles, moments, seen, strict=True):
                if moment is not None:
                    before.append(moment)
                    console.print(Text(f"{title}: " if len(runs) > 1 else "", _QUIET)
                                  + tail_text(prompt, moment, tokenizer))
        return seen
    with Live(console=console, refresh_per_second=20, vertical_overflow="visible") as live:
        for moments in steps:
            for moment, before in zip(moments, seen, strict=True):
                if moment is not None:
                    before.append(moment)
            live.update(_columns([_panel(title if len(runs) > 1 else "", prompt, before[-1], tokenizer)
                                  for title, before in zip(titles, seen, strict=True)]))
    return seen


def _panel(title: str, prompt: str, moment: Moment, tokenizer: Tokenizer) -> Group:
    head = [Text(visible(title), "bold " + _tint(1.0))] if title else []
    return Group(*head, tail_text(prompt, moment, tokenizer), gauges(moment))


def _columns(panels: Sequence[Group]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2))
    for _ in panels:
        grid.add_column(ratio=1, overflow="fold")
    grid.add_row(*panels)
    return grid


def stream_text(prompt: str, moments: Iterable[Moment]) -> list[Moment]:
    """Prints the text as it is committed; an incomplete character is printed when it is complete. Returns all steps."""
    sys.stdout.write(visible(prompt))
    written, seen = 0, []
    for moment in moments:
        seen.append(moment)
        ready = moment.text.rstrip("\N{REPLACEMENT CHARACTER}")
        sys.stdout.write(visible(ready[written:]))
        sys.stdout.flush()
        written = max(written, len(ready))
    if seen:
        sys.stdout.write(visible(seen[-1].text[written:]))
    sys.stdout.write("\n")
    return seen
