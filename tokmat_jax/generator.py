"""Text from a run: prompt → buckets → cache → liquid tail → text.

Shapes come in powers of two, so that a second prompt of another length compiles nothing; rows are independent, so
that neither buckets nor neighbours change a sample.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax import cache, decode, objective
from tokmat_jax.checkpoint import load_params
from tokmat_jax.config import Config, GenerationConfig
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.model import Params, make_forward
from tokmat_jax.table import Vocabulary, look_up, read
from tokmat_jax.train_step import init_params
from tokmat_jax.trajectory import Trajectory
from tokmat_jax.workdir import TOKENIZER, load_config

_SMALLEST_CHUNK, _LARGEST_CHUNK = 4, 16
_SMALLEST_PROMPT, _SMALLEST_HISTORY = 16, 64


@dataclass(frozen=True)
class Sample:
    """What one row committed."""

    prompt: str
    number: int
    """Which of the prompt's samples this is, from 0."""
    text: str
    """The new text, without the prompt and without end-of-text."""
    tokens: list[int]
    """Committed ids; the last one is end-of-text where `finished`."""
    entropy: list[float]
    """Per token, at commit, of softmax(cos/τ), nats."""
    movement: list[float]
    """Per token, ‖Δz̃‖/R of its last update."""
    finished: bool
    """Whether it ended with end-of-text rather than with its budget."""


@dataclass(frozen=True)
class Moment:
    """One step of one row, for those who watch."""

    text: str
    """All new text so far."""
    tokens: list[int]
    """Committed ids so far."""
    tail: list[int]
    """Nearest tokens of the slots behind the one just committed, front first."""
    entropy: list[float]
    """Per slot, the one just committed first, nats."""
    movement: list[float]
    """Per slot, ‖Δz̃‖/R."""


@dataclass(frozen=True)
class Row:
    """One sample to be made."""

    prompt: str
    ids: list[int]
    """Ids of the prompt, at least one."""
    number: int
    """Which of the prompt's samples it is, from 0."""


@dataclass(frozen=True)
class Batch:
    """Rows in their bucket of shapes; rows that only fill it have no budget."""

    ids: np.ndarray
    """Prompts [B, P] int32, filled up behind their end."""
    lengths: np.ndarray
    """[B] int32, ids of each prompt."""
    budgets: np.ndarray
    """[B] int32, tokens that each row may commit."""
    names: np.ndarray
    """[B, 3] uint32, what `sample_key` makes each row's key of."""
    capacity: int
    """Positions of the history, the same for every length in the bucket."""


class Generator:
    """A trained model, its vocabulary table and its tokenizer."""

    def __init__(self, config: Config, params: Params, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self._compilations = 0
        self._prefill = jax.jit(self._trace_prefill, static_argnames=("capacity", "repelled"))
        self._advance = jax.jit(
            self._trace_advance,
            static_argnames=("guided", "repelled", "read_tail", "num_steps", "num_candidates"),
            donate_argnames="state",
        )
        self._read = jax.jit(self._trace_read)
        self.set_params(params)

    @classmethod
    def from_workdir(cls, workdir: str | Path) -> "Generator":
        """The newest checkpoint of a run; raises UserError where there is none."""
        workdir = Path(workdir)
        config = load_config(workdir)
        tokenizer = load_tokenizer(workdir / TOKENIZER)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config, tokenizer.vocab_size))
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
        params, _ = load_params(workdir, shapes)
        return cls(config, params, tokenizer)

    def set_params(self, params: Params) -> None:
        """Other parameters of the same shapes; what is compiled stays."""
        self.params = params
        self._params = params["backbone"]
        self._vocabulary = objective.vocabulary(params, self.config)
        self._logit_scale = objective.ar_logit_scale(params, self.config)

    @property
    def backbone(self) -> Params:
        """Parameters of the backbone f_θ."""
        return self._params

    @property
    def vocabulary(self) -> Vocabulary:
        """What tokens are when they are read and written."""
        return self._vocabulary

    @property
    def logit_scale(self) -> jax.Array:
        """What multiplies ⟨ẑ, e_i⟩ in the logits of a baseline []."""
        return self._logit_scale

    @property
    def settings(self) -> GenerationConfig:
        """How it writes where nothing else is said: the run's `generation`. A baseline's plain text is greedy, whatever
        repulsion the maturation run of the same config has."""
        own = self.config.generation
        return dataclasses.replace(own, repulsion=0.0) if self.is_autoregressive else own

    def compilations(self) -> int:
        """How many shapes have been compiled so far."""
        return self._compilations

    def generate(
        self, prompts: Sequence[str | Sequence[int]], settings: GenerationConfig | None = None, num_samples: int = 1,
        seed: int = 0, batch_size: int = 16,
    ) -> list[Sample]:
        """`num_samples` continuations of each of `prompts` (text or ids), in their order.

        A sample depends on its prompt, its number, `seed` and `settings` (None: those of the run), on nothing else.
        An empty prompt starts from end-of-text. Raises UserError where the positions do not suffice.
        """
        settings = self.settings if settings is None else settings
        rows = self.rows(prompts, settings, num_samples)
        samples: list[Sample | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        for begin in range(0, len(rows), batch_size):
            batch = order[begin : begin + batch_size]
            for index, sample in zip(batch, self._run(rows, batch, settings, seed), strict=True):
                samples[index] = sample
        return [sample for sample in samples if sample is not None]

    def stream(
        self, prompt: str | Sequence[int], settings: GenerationConfig | None = None, number: int = 0, seed: int = 0
    ) -> Iterator[Moment]:
        """The same sample as `generate`, one step at a time, with its tail; `prompt` is text or ids."""
        settings = self.settings if settings is None else settings
        row = dataclasses.replace(self.rows([prompt], settings)[0], number=number)
        state, tail = self._start([row], settings, seed)
        tokens: list[int] = []
        while not bool(state.done[0]):
            state, step = self._steps(state, tail, settings, num_steps=1, read_tail=True)
            slots = np.asarray(step.tokens[0, 0]).tolist()
            tokens.append(slots[0])
            yield Moment(
                self.tokenizer.decode(tokens), list(tokens), slots[1:],
                np.asarray(step.entropy[0, 0]).tolist(), np.asarray(step.movement[0, 0]).tolist(),
            )

    def record(
        self, prompt: str | Sequence[int], settings: GenerationConfig | None = None, number: int = 0, seed: int = 0,
        num_candidates: int = 8,
    ) -> Trajectory:
        """The same sample as `generate` with everything that its tail went through."""
        settings = self.settings if settings is None else settings
        row = dataclasses.replace(self.rows([prompt], settings)[0], number=number)
        state, tail = self._start([row], settings, seed)
        steps, count = [], chunk(settings.max_new_tokens)
        while not bool(state.done[0]):
            state, step = self._steps(state, tail, settings, count, read_tail=True, num_candidates=num_candidates)
            steps.append(jax.tree.map(np.asarray, step))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
        alive = np.asarray(whole.emitted)[:, 0]
        return Trajectory(*(np.asarray(part)[alive, 0] for part in (
            whole.tokens, whole.entropy, whole.movement, whole.candidates, whole.cosines)))

    def next_tokens(self, ids: Sequence[int]) -> list[int]:
        """The nearest token to the prediction behind every prefix of `ids` (at least one, at most all positions).

        Committed vectors alone are read, as the baseline does; for a run with a tail that is K = 0.
        """
        width = min(bucket(len(ids), _SMALLEST_PROMPT), self.config.max_positions)
        padded = np.full((1, width), self.tokenizer.end_of_text, np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self._read(self._params, self._vocabulary, padded))[0, : len(ids)].tolist()

    @property
    def is_autoregressive(self) -> bool:
        """Whether this is the baseline: it has no tail, so K = 1, rate 1, no noise and no guidance. Its predictions
        are vectors all the same, which repulsion may push."""
        return self.config.objective.kind == "ar"

    def rows(
        self, prompts: Sequence[str | Sequence[int]], settings: GenerationConfig, num_samples: int = 1
    ) -> list[Row]:
        """A Row per prompt and sample; raises UserError unless each prompt is text and has room for `settings`."""
        if settings.repulsion > 0 and not self.config.table.tied:
            raise UserError("repulsion compares tokens as they are read with tokens as they are written, and this "
                            "model has an output table of its own: leave out --repulsion")
        rows, tail_length = [], 1 if self.is_autoregressive else settings.tail_length
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str) and not _is_unicode(prompt):
                raise UserError(f"prompt {index + 1} is not valid Unicode (half of a surrogate pair, or bytes that are "
                                f"not UTF-8): {prompt!r}")
            ids = [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
            ids = ids or [self.tokenizer.end_of_text]
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            needed = len(ids) + settings.max_new_tokens + tail_length
            if needed > self.config.max_positions:
                raise UserError(
                    f"prompt {index + 1} has {len(ids)} tokens; with {settings.max_new_tokens} new ones and a tail of "
                    f"{tail_length} it needs {needed} positions, the model has {self.config.max_positions}: shorten "
                    f"the prompt, --max-new-tokens or --tail-length")
            rows.extend(Row(text, ids, number) for number in range(num_samples))
        return rows

    def _tail(self, settings: GenerationConfig) -> decode.Tail:
        if self.is_autoregressive:
            return decode.make_tail(1, "constant", 1.0, 0.0, temperature=settings.entropy_temperature,
                                    repulsion=settings.repulsion, repulsion_sharpness=settings.repulsion_sharpness)
        return decode.make_tail(settings.tail_length, settings.profile, settings.max_maturity, settings.tail_noise,
                                settings.guidance_scale, settings.entropy_temperature, settings.rate,
                                settings.history_noise, settings.repulsion, settings.repulsion_sharpness)

    def _start(self, rows: Sequence[Row], settings: GenerationConfig, seed: int) -> tuple[decode.State, decode.Tail]:
        """The state behind the prompts of `rows`, and how its tail is run."""
        batch = make_batch(rows, settings.max_new_tokens, seed, self.config.max_positions, self.tokenizer.end_of_text)
        tail = jax.tree.map(np.asarray, self._tail(settings))
        state = self._prefill(self._params, self._vocabulary, batch.ids, batch.lengths, batch.budgets, batch.names,
                              tail, capacity=batch.capacity, repelled=settings.repulsion != 0.0)
        return state, tail

    def _steps(self, state: decode.State, tail: decode.Tail, settings: GenerationConfig, num_steps: int,
               read_tail: bool, num_candidates: int = 0) -> tuple[decode.State, decode.Step]:
        guided = settings.guidance_scale != 1.0 and not self.is_autoregressive
        return self._advance(self._params, self._vocabulary, state, tail, guided=guided,
                             repelled=settings.repulsion != 0.0, read_tail=read_tail, num_steps=num_steps,
                             num_candidates=num_candidates)

    def _run(self, rows: list[Row], batch: list[int], settings: GenerationConfig, seed: int) -> list[Sample]:
        chosen = [rows[index] for index in batch]
        state, tail = self._start(chosen, settings, seed)
        steps, count = [], chunk(settings.max_new_tokens)
        while not bool(jnp.all(state.done)):
            state, step = self._steps(state, tail, settings, count, read_tail=False)
            steps.append(jax.tree.map(np.asarray, step))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
        return [self._sample(row, index, whole) for index, row in enumerate(chosen)]

    def _sample(self, row: Row, index: int, steps: decode.Step) -> Sample:
        emitted = np.asarray(steps.emitted)[:, index]
        tokens, entropy, movement = (np.asarray(part)[emitted, index, 0].tolist()
                                     for part in (steps.tokens, steps.entropy, steps.movement))
        return Sample(row.prompt, row.number, self.tokenizer.decode(tokens), tokens, entropy, movement,
                      tokens[-1] == self.tokenizer.end_of_text)

    def sample_of(self, prompt: str, number: int, moments: Sequence[Moment]) -> Sample:
        """The sample that all `moments` of a stream (at least one) add up to."""
        last = moments[-1]
        return Sample(prompt, number, last.text, last.tokens, [moment.entropy[0] for moment in moments],
                      [moment.movement[0] for moment in moments], last.tokens[-1] == self.tokenizer.end_of_text)

    @functools.cached_property
    def _forward(self):
        return make_forward(self.config)

    def _told_tail_length(self, tail: decode.Tail) -> int:
        return 0 if self.is_autoregressive else tail.maturity.shape[0]

    def _trace_prefill(self, params, vocabulary, ids, lengths, budgets, names, tail, capacity, repelled):
        self._compilations += 1
        told = jnp.full(lengths.shape, self._told_tail_length(tail), jnp.int32)
        vectors = look_up(vocabulary.table, ids)
        memory = cache.prefill(params, self._forward, vectors, told, capacity, repelled)
        last = jnp.take_along_axis(vectors, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return decode.start(jax.vmap(sample_key)(names), last, lengths, budgets, memory, tail, self.config.table.radius)

    def _trace_read(self, params, vocabulary, ids):
        self._compilations += 1
        batch, width = ids.shape
        positions = jnp.broadcast_to(jnp.arange(width)[None, :], ids.shape)
        prediction, _ = self._forward(params, look_up(vocabulary.table, ids), jnp.ones(ids.shape),
                                      jnp.zeros((batch,), jnp.int32), positions)
        return read(prediction, vocabulary, 1.0)[0]

    def _trace_advance(self, params, vocabulary, state, tail, guided, repelled, read_tail, num_steps,
                       num_candidates):
        self._compilations += 1
        predict = cache.cached_predict(params, self._forward, tail, self._told_tail_length(tail), guided, repelled)
        return decode.run(state, predict, vocabulary, tail, self.config.table.radius, self.tokenizer.end_of_text,
                          num_steps, read_tail, num_candidates)


def make_batch(rows: Sequence[Row], max_new_tokens: int, seed: int, max_positions: int, fill: int) -> Batch:
    """`rows` in their bucket: every length in it comes to the same shapes. Ids behind a prompt's end are `fill`."""
    size = bucket(len(rows), 1)
    width = min(bucket(max(len(row.ids) for row in rows), _SMALLEST_PROMPT), max_positions)
    capacity = min(bucket(width + max_new_tokens, _SMALLEST_HISTORY), max_positions)
    ids = np.full((size, width), fill, np.int32)
    lengths, budgets = np.ones(size, np.int32), np.zeros(size, np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        lengths[index], budgets[index] = len(row.ids), max_new_tokens
    names = np.zeros((size, 3), np.uint32)
    names[: len(rows)] = [(seed, zlib.crc32(np.asarray(row.ids, np.int32).tobytes()), row.number) for row in rows]
    return Batch(ids, lengths, budgets, names, capacity)


def sample_key(name: jax.Array) -> jax.Array:
    """The key of a sample from its `name` [3]: seed, checksum of the prompt's ids, number. No batch can change it."""
    seed, prompt, number = name
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), number)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def chunk(max_new_tokens: int) -> int:
    """Steps of one scan: a power of two, so that few budgets compile anew, and none runs far beyond its end."""
    return min(bucket(max_new_tokens, _SMALLEST_CHUNK), _LARGEST_CHUNK)


def bucket(length: int, smallest: int) -> int:
    """The next power of two from `length` on, at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())
