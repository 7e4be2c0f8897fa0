"""A language model that scores texts: nats and entropy per token, and the prediction at the end of the text."""

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
"""Upper bound of the size B · T · V of one batch."""
_SHORTEST = 32


@dataclass(frozen=True)
class Reading:
    """The judge's results for one continuation of M judge tokens."""

    nats: np.ndarray
    """−log p [M] of each token, given all tokens before it."""
    entropy: np.ndarray
    """Entropy [M] in nats of softmax(cos(ẑ, E)), τ = 1, at the position that predicts each token."""
    ending: np.ndarray
    """Prediction ẑ [d] after the whole text, which represents the text in MAUVE."""


class Judge:
    """A judge: an autoregressive model of this library, trained or imported."""

    def __init__(self, generator: Generator):
        if not generator.is_autoregressive:
            raise UserError(f"{generator.config.workdir} cannot judge: it is a {generator.config.objective.kind} run; "
                            f"a judge must be an autoregressive model (a baseline or an import)")
        self.generator = generator
        self.tokenizer = generator.tokenizer
        self._forward = make_forward(generator.config)
        self._read = jax.jit(self._trace_read)

    def read_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Reading]:
        """Reads (prompt, continuation) pairs of the judge's own ids. If a pair has more tokens than the judge has
        positions, the start of the prompt is cut; raises UserError if the continuation alone is too long."""
        limit = self.generator.config.max_positions
        rows = []
        for prompt, new in pairs:
            if len(new) >= limit:
                raise UserError(f"the judge has {limit} positions, a continuation has {len(new)} of its tokens: lower "
                                f"--max-new-tokens")
            prefix = list(self.tokenizer.prefix)  # already present at the beginning of a document
            prefix = [] if list(prompt[: len(prefix)]) == prefix else prefix
            before = [*prefix, *prompt] or [self.tokenizer.end_of_text]
            rows.append((before[-(limit - len(new)) :], list(new)))
        lengths = [len(before) + len(new) for before, new in rows]
        return in_batches(rows, lengths, self._room, self._batch)

    def read_texts(self, pairs: Sequence[tuple[str, str]]) -> list[Reading]:
        """Reads (prompt, continuation) pairs of text; a token that spans both counts for the continuation."""
        return self.read_ids([self.tokenizer.encode_split(prompt, new) for prompt, new in pairs])

    def _room(self, shortest: int) -> tuple[int, int]:
        """Number of rows and width of a batch whose shortest row has length `shortest`."""
        width = min(bucket(shortest, _SHORTEST), self.generator.config.max_positions)
        return max(1, min(64, _NUMBERS_AT_ONCE // (width * self.tokenizer.vocab_size))), width

    def _batch(self, rows: list[tuple[list[int], list[int]]]) -> list[Reading]:
        """Reads `rows`, sorted from the shortest to the longest, as one batch."""
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
    """exp of the mean nats per token over all `readings`; NaN if they have no token."""
    nats = np.concatenate([one.nats for one in readings])
    return float(np.exp(nats.mean())) if nats.size else float("nan")
