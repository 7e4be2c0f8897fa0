"""A language model that reads texts: nats and entropy per token, and the vector that it ends with."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.errors import UserError
from tokmat_jax.generation.batches import bucket, in_batches
from tokmat_jax.generation.generator import Generator
from tokmat_jax.method import losses
from tokmat_jax.method.table import entropy_of, look_up, scores
from tokmat_jax.model.backbone import make_forward

_NUMBERS_AT_ONCE = 2**26
"""Bounds [B, T, V] of one batch that is read."""
_SHORTEST = 32


@dataclass(frozen=True)
class Reading:
    """What the judge found in one continuation of M of its own tokens."""

    nats: np.ndarray
    """−log p [M] of each token behind everything before it."""
    entropy: np.ndarray
    """[M] nats of softmax(cos(ẑ, E)), τ = 1, where each token was chosen."""
    ending: np.ndarray
    """Prediction ẑ [d] behind the whole text: what stands for it in MAUVE."""


class Judge:
    """An autoregressive model of ours, trained or imported."""

    def __init__(self, generator: Generator):
        if not generator.is_autoregressive:
            raise UserError(f"{generator.config.workdir} cannot judge: it is a maturation run, a judge is a language "
                            f"model (an autoregressive baseline or an import)")
        self.generator = generator
        self.tokenizer = generator.tokenizer
        self._forward = make_forward(generator.config)
        self._read = jax.jit(self._trace_read)

    def read_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Reading]:
        """Reads (prompt, continuation) pairs of the judge's own ids. Where positions do not suffice, the prompt's
        beginning is left out; raises UserError where the continuation alone is too long."""
        limit = self.generator.config.max_positions
        rows = []
        for prompt, new in pairs:
            if len(new) >= limit:
                raise UserError(f"the judge has {limit} positions, a continuation has {len(new)} of its tokens: lower "
                                f"--max-new-tokens")
            prefix = list(self.tokenizer.prefix)  # the beginning of a document has it already
            prefix = [] if list(prompt[: len(prefix)]) == prefix else prefix
            before = [*prefix, *prompt] or [self.tokenizer.end_of_text]
            rows.append((before[-(limit - len(new)) :], list(new)))
        lengths = [len(before) + len(new) for before, new in rows]
        return in_batches(rows, lengths, self._room, self._batch)

    def read_texts(self, pairs: Sequence[tuple[str, str]]) -> list[Reading]:
        """Reads (prompt, continuation) pairs of text; a token that straddles the two counts for the continuation."""
        return self.read_ids([self.tokenizer.encode_split(prompt, new) for prompt, new in pairs])

    def _room(self, shortest: int) -> tuple[int, int]:
        """How many rows a batch has, and how wide it is."""
        width = min(bucket(shortest, _SHORTEST), self.generator.config.max_positions)
        return max(1, min(64, _NUMBERS_AT_ONCE // (width * self.tokenizer.vocab_size))), width

    def _batch(self, rows: list[tuple[list[int], list[int]]]) -> list[Reading]:
        """Reads `rows`, the shortest first."""
        count, width = self._room(sum(map(len, rows[0])))
        ids = np.full((bucket(count, 1), width), self.tokenizer.end_of_text, np.int32)
        lengths = np.ones(len(ids), np.int32)
        for index, (before, new) in enumerate(rows):
            whole = [*before, *new]
            ids[index, : len(whole)], lengths[index] = whole, len(whole)
        nats, entropy, ending = (np.asarray(part) for part in self._read(
            self.generator.backbone, self.generator.vocabulary, self.generator.logit_scale, ids, lengths))
        found = []
        for index, (before, new) in enumerate(rows):
            inside = slice(len(before) - 1, len(before) - 1 + len(new))
            found.append(Reading(nats[index, inside], entropy[index, inside], ending[index]))
        return found

    def _trace_read(self, params, vocabulary, scale, ids, lengths):
        batch, width = ids.shape
        positions = jnp.broadcast_to(jnp.arange(width)[None, :], ids.shape)
        told = jnp.zeros((batch,), jnp.int32)
        vectors = look_up(vocabulary.table, ids)
        prediction, _ = self._forward(params, vectors, jnp.ones(ids.shape), told, positions)
        nats = losses.cross_entropy(prediction[:, :-1], ids[:, 1:], vocabulary.readout, scale)
        inner = scores(prediction[:, :-1], vocabulary.readout)
        entropy = entropy_of(inner, prediction[:, :-1], vocabulary)
        return nats, entropy, prediction[jnp.arange(batch), lengths - 1]


def perplexity(readings: Sequence[Reading]) -> float:
    """exp of the mean nats per token over all `readings`; NaN where they hold no token."""
    nats = np.concatenate([one.nats for one in readings])
    return float(np.exp(nats.mean())) if nats.size else float("nan")
