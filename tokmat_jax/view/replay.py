"""A self-contained HTML page that replays the generation of one sample, or of two side by side."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.data.tokenizer import Tokenizer
from tokmat_jax.generation.trajectory import Trajectory
from tokmat_jax.view.terminal import visible

_PAGE = Path(__file__).parent / "page"
_ENTROPY_SCALE, _SCALE = 10_000, 1_000
# Characters that could open or close HTML, and two line separators that older JavaScript does not allow in strings.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Run:
    """One sample to replay."""

    title: str
    """How this sample differs, such as `guidance 1`; any text."""
    trajectory: Trajectory
    settings: dict[str, Any]
    """Shown in a collapsed list of names and values."""


def replay(title: str, runs: Sequence[Run], tokenizer: Tokenizer) -> str:
    """The page for one run, or for two side by side. Raises ValueError for any other number."""
    if len(runs) not in (1, 2):
        raise ValueError(f"a page replays one run or two, not {len(runs)}")
    style, script = ((_PAGE / name).read_text(encoding="utf-8") for name in ("replay.css", "replay.js"))
    parts = {
        # Allow only this script and this style, whatever text a model or a user puts into the page.
        "policy": f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}",
        "title": html.escape(visible(title)),
        "style": style,
        "script": script,
        "data": json.dumps(_data(runs, tokenizer), ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES),
        "plain": "".join(_plain(run, tokenizer) for run in runs),
    }
    page = (_PAGE / "replay.html").read_text(encoding="utf-8")
    # A single pass: inserted text is not searched for placeholders.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)


def increments(prompt: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each of `ids` [M], at least one, adds to the text of `prompt`: M strings whose concatenation is
    the text that `tokenizer.split` gives for all ids.

    A token that ends inside a character adds "" for it; the token that completes the character adds it.
    """
    whole = tokenizer.split(prompt, ids)[1]
    ends, end = [], 0
    for count in range(1, len(ids)):
        ready = tokenizer.split(prompt, ids[:count])[1].rstrip("\N{REPLACEMENT CHARACTER}")
        # Text that later tokens would change is held back as well.
        while not whole.startswith(ready):
            ready = ready[:-1]
        end = max(end, len(ready))
        ends.append(end)
    return [whole[begin:end] for begin, end in zip([0, *ends], [*ends, len(whole)], strict=True)]


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _plain(run: Run, tokenizer: Tokenizer) -> str:
    """The final text, for browsers without JavaScript."""
    prompt, text = (html.escape(visible(part)) for part in _texts(run.trajectory, tokenizer))
    return f"<section><h2>{html.escape(visible(run.title))}</h2><p class=text><b>{prompt}</b>{text}</p></section>"


def _texts(trajectory: Trajectory, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of the prompt and the text generated after it."""
    return tokenizer.split(trajectory.prompt.tolist(), trajectory.text.tolist())


def _data(runs: Sequence[Run], tokenizer: Tokenizer) -> dict[str, Any]:
    """The data for the script. Tokens are indices into `pieces`, which has the text of each token once."""
    ids = np.unique(np.concatenate([
        part.ravel() for run in runs for part in (run.trajectory.tokens, run.trajectory.candidates,
                                                  run.trajectory.drafts[run.trajectory.drafts >= 0])])).astype(int)
    return {
        "pieces": [visible(tokenizer.piece(token)) or f"⟨{token}⟩" for token in ids.tolist()],
        "end": ids.tolist().index(tokenizer.end_of_text) if tokenizer.end_of_text in ids else None,
        "entropyScale": _ENTROPY_SCALE,
        "scale": _SCALE,
        "runs": [_run_data(run, ids, tokenizer) for run in runs],
    }


def _run_data(run: Run, ids: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """The data of one run, with arrays flattened row by row. `ids` are sorted and contain every token of the run."""
    trajectory = run.trajectory
    return {
        "title": visible(run.title),
        "settings": [[visible(name), visible(str(value))] for name, value in run.settings.items()],
        "prompt": visible(_texts(trajectory, tokenizer)[0]),
        "text": [visible(part) for part in increments(trajectory.prompt.tolist(), trajectory.text.tolist(), tokenizer)],
        "maturity": _whole(trajectory.maturity, _SCALE),
        "committed": trajectory.committed.tolist(),
        "tokens": np.searchsorted(ids, trajectory.tokens.ravel()).tolist(),
        "entropy": _whole(trajectory.entropy, _ENTROPY_SCALE),
        "movement": _whole(trajectory.movement, _SCALE),
        "candidates": np.searchsorted(ids, trajectory.candidates.ravel()).tolist(),
        "cosines": _whole(trajectory.cosines, _SCALE),
        "drafts": np.where(trajectory.drafts < 0, -1, np.searchsorted(ids, trajectory.drafts)).ravel().tolist(),
    }


def _whole(values: np.ndarray, scale: int) -> list[int | None]:
    """`values` times `scale`, rounded to whole numbers to keep the page small; None if a value is not finite."""
    return [round(value * scale) if math.isfinite(value) else None for value in values.ravel().tolist()]
