"""The liquid tail in a terminal: committed text, and dimmed behind it what the slots would say now."""

import sys
import unicodedata
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tokmat_jax.data.tokenizer import Tokenizer
from tokmat_jax.generator import Moment

_DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_COMMITTED, _TAIL = "default", "grey50"


def visible(text: str) -> str:
    """`text` without what a terminal would obey rather than show: control characters but new lines and tabs, and
    what turns the direction of writing."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _commands(c) else c for c in text)


def _commands(c: str) -> bool:
    return (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in _DIRECTIONS


def tail_text(prompt: str, moment: Moment, tokenizer: Tokenizer) -> Text:
    """Prompt in bold, committed text, and the tail dimmed between bars: `In the beginning was│ the│ Lord│`."""
    text = Text(visible(prompt), "bold")
    text.append(visible(moment.text), _COMMITTED)
    pieces = [visible(tokenizer.piece(token)).replace("\n", "⏎") for token in moment.tail]
    text.append("│" + "│".join(pieces) + "│" if pieces else "", _TAIL)
    return text


def status(moment: Moment) -> Text:
    """One line on the step just done."""
    return Text(f"step {len(moment.tokens)} · committed at entropy {moment.entropy[0]:.3f} nats · "
                f"moved {moment.movement[0]:.2f} R", _TAIL)


def show_tail(prompt: str, moments: Iterable[Moment], tokenizer: Tokenizer) -> Moment | None:
    """Draws every step: in place in a terminal, a line per step elsewhere. Returns the last one."""
    console = Console(soft_wrap=True, highlight=False)
    moment = None
    if not console.is_terminal:
        for moment in moments:
            console.print(tail_text(prompt, moment, tokenizer))
        return moment
    with Live(console=console, refresh_per_second=20, vertical_overflow="visible") as live:
        for moment in moments:
            live.update(Group(tail_text(prompt, moment, tokenizer), status(moment)))
    return moment


def stream_text(prompt: str, moments: Iterable[Moment]) -> Moment | None:
    """Writes the text as it is committed; half a character waits for its other half. Returns the last step."""
    sys.stdout.write(visible(prompt))
    written, moment = 0, None
    for moment in moments:
        ready = moment.text.rstrip("\N{REPLACEMENT CHARACTER}")
        sys.stdout.write(visible(ready[written:]))
        sys.stdout.flush()
        written = max(written, len(ready))
    if moment is not None:
        sys.stdout.write(visible(moment.text[written:]))
    sys.stdout.write("\n")
    return moment
