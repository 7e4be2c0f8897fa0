"""The inputs of a comparison: a maturation run, its baseline, and held-out text that both continue."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.config import Config
from tokmat_jax.config.checks import facts_of
from tokmat_jax.config.saved import differences
from tokmat_jax.data.corpus import Corpus
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.storage.files import read_json
from tokmat_jax.storage.workdir import CHECKPOINTS, CORPUS


def mismatches(run: Generator, baseline: Generator, workdirs: tuple[Path, Path]) -> list[str]:
    """Differences in what must be equal for both: tokenizer, data, backbone, optimiser, budget, steps trained."""
    found = []
    same_ids = run.tokenizer.same_ids(baseline.tokenizer)
    if not same_ids:
        found.append("the tokenizers differ")
    facts = [read_json(workdir / CORPUS) if (workdir / CORPUS).is_file() else {} for workdir in workdirs]
    same_corpus = _same_corpus(facts[0], facts[1], same_ids)
    found += config_mismatches(run.config, baseline.config, same_ids, same_corpus and facts[0] != {})
    if not same_corpus:
        found.append(f"the corpus has the fingerprint {facts[0].get('fingerprint')}, the baseline's "
                     f"{facts[1].get('fingerprint')}")
    steps = [checkpoint_state(workdir)[0] for workdir in workdirs]
    if steps[0] != steps[1]:
        found.append(f"the newest checkpoint is step {steps[0]}, the baseline's {steps[1]}")
    return found


def _same_corpus(ours: dict[str, Any], theirs: dict[str, Any], same_ids: bool) -> bool:
    """Whether two runs were trained on the same corpus, by its facts. If the tokenizers have the `same_ids`, their
    names do not matter."""
    renamed = same_ids and ours.get("tokenizer") != theirs.get("tokenizer")
    named = ("tokenizer", "fingerprint") if renamed else ()
    one, other = ({key: value for key, value in facts.items() if key not in named} for facts in (ours, theirs))
    return one == other


def config_mismatches(run: Config, baseline: Config, same_ids: bool, same_corpus: bool = False) -> list[str]:
    """Fields in which two configs differ although they must agree. If the tokenizers are known to have the `same_ids`,
    their names do not matter; if both have the `same_corpus`, the location of its text does not matter."""
    # A run that starts from another one names that run's tokenizer and positions; only their values count.
    paired = facts_of(Config, "paired")
    paired |= {name: False for name in paired if (same_ids and name.startswith("tokenizer.")) or (
        same_corpus and name == "data.source") or (
            run.max_positions == baseline.max_positions and name == "model.max_positions")}
    return [f"{name} is {ours!r}, the baseline has {theirs!r}"
            for name, (ours, theirs) in differences(run, baseline).items() if paired[name]]


def checkpoint_state(workdir: Path) -> tuple[int, int]:
    """The newest step of a workdir and the time at which it was written (ns). Together they identify its state."""
    steps = [path for path in (workdir / CHECKPOINTS).glob("*") if path.name.isdigit()]
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet: train it with train.py --workdir {workdir}")
    newest = max(steps, key=lambda path: int(path.name))
    return int(newest.name), newest.stat().st_mtime_ns


@dataclass(frozen=True)
class Prompts:
    """Prompts from held-out documents, with the human text that follows them."""

    ids: list[list[int]]
    """N prompts of P ids each."""
    human: list[list[int]]
    """The L ids that follow each prompt."""
    notes: tuple[str, ...]
    """Notes if there are fewer or shorter prompts than requested."""

    def contexts(self, count: int, ahead: int) -> tuple[list[list[int]], np.ndarray]:
        """`count` contexts of P ids along the text of each prompt, and the `ahead` ids after each [·, ahead]."""
        prompts, after = [], []
        for prompt, human in zip(self.ids, self.human, strict=True):
            whole = [*prompt, *human]
            for offset in np.linspace(0, len(human) - ahead, count).astype(int):
                begin, end = int(offset), int(offset) + len(prompt)
                prompts.append(whole[begin:end])
                after.append(whole[end : end + ahead])
        return prompts, np.array(after)


def held_out_prompts(
    windows: Sequence[dict], end_of_text: int, num_prompts: int, prompt_tokens: int, new_tokens: int
) -> Prompts:
    """`num_prompts` stretches of `prompt_tokens` + `new_tokens` ids of held-out `windows`, each inside one document.

    They do not overlap and are spread over the documents: the first stretch of each, then the second of each, … .
    Raises UserError if no document is long enough.
    """
    stream = np.concatenate([windows[index]["tokens"] for index in range(len(windows))])
    length = prompt_tokens + new_tokens
    documents = [part[part != end_of_text] for part in np.split(stream, np.flatnonzero(stream == end_of_text))]
    rounds = max((len(document) // length for document in documents), default=0)
    stretches = [document[turn * length : (turn + 1) * length].tolist() for turn in range(rounds)
                 for document in documents if len(document) >= (turn + 1) * length]
    if not stretches:
        raise UserError(f"no held-out document has {prompt_tokens} + {new_tokens} tokens, the longest has "
                        f"{max(map(len, documents))}: lower --prompt-tokens or --max-new-tokens")
    notes = ()
    if len(stretches) < num_prompts:
        notes = (f"{num_prompts} prompts were asked for, the held-out text has {len(stretches)}",)
    taken = stretches[:num_prompts]
    return Prompts([one[:prompt_tokens] for one in taken], [one[prompt_tokens:] for one in taken], notes)


def prompts_of(corpus: Corpus, config: Config, num_prompts: int, prompt_tokens: int, new_tokens: int) -> Prompts:
    """Prompts for a run with `config`. If they do not fit into its positions, they are shorter, with a note."""
    room = config.max_positions - new_tokens - 1
    if room < 1:
        raise UserError(f"--max-new-tokens {new_tokens} leaves no room for a prompt: the model has "
                        f"{config.max_positions} positions")
    found = held_out_prompts(corpus.windows("validation"), corpus.tokenizer.end_of_text, num_prompts,
                             min(prompt_tokens, room), new_tokens)
    if room >= prompt_tokens:
        return found
    short = f"prompts of {prompt_tokens} tokens were asked for, the model's positions leave {room}"
    return Prompts(found.ids, found.human, (short, *found.notes))
