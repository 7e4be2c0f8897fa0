"""Text from a run: prompt → buckets → cache → liquid tail → text."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.config import ComputeConfig, Config, GenerationConfig, MeshConfig
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokmat_jax.distributed.mesh import make_mesh, replicated, spread
from tokmat_jax.errors import UserError
from tokmat_jax.generation import cache
from tokmat_jax.generation.batches import SMALLEST_PROMPT, Batch, Row, bucket, chunk, make_batch, sample_key
from tokmat_jax.generation.partial_sample import PartialSample, held_at, with_vectors
from tokmat_jax.generation.requests import Prompt, counts, ids_of, is_unicode, prompts_of, seed_of, whole_number
from tokmat_jax.generation.trajectory import Trajectory
from tokmat_jax.method.algorithm import DecodeState, Record, decode, start_decoding
from tokmat_jax.method.steering import direction_of
from tokmat_jax.method.table import Vocabulary, look_up, read
from tokmat_jax.method.tail import Tail, make_tail
from tokmat_jax.model.backbone import Params, apart, make_forward
from tokmat_jax.model.params import ar_logit_scale_of, param_shapes, vocabulary_of
from tokmat_jax.storage.checkpoint import load_params
from tokmat_jax.storage.workdir import TOKENIZER, load_config


@dataclass(frozen=True)
class Sample:
    """What one row committed."""

    prompt: str
    """As it was given; of ids their text."""
    number: int
    """Which of the prompt's samples this is, from 0."""
    text: str
    """What the new tokens add to the text of the prompt's ids (`Tokenizer.split`), without end-of-text."""
    tokens: list[int]
    """Committed ids; the last one is end-of-text where `finished`."""
    entropy: list[float]
    """Per token, at commit, of softmax(cos/τ), nats."""
    movement: list[float]
    """Per token, ‖Δz̃‖/R of its last update."""
    finished: bool
    """Whether it ended with end-of-text rather than with its budget."""
    passes: int
    """Steps that it took, each one forward pass (two with guidance); as many as tokens but for stable commits."""


@dataclass(frozen=True)
class Moment:
    """One step of one row, for those who watch."""

    text: str
    """All new text so far, as in `Sample`."""
    tokens: list[int]
    """Committed ids so far."""
    committed: int
    """How many of them this step committed; 1 but for stable commits."""
    tail: list[int]
    """Nearest tokens of the slots behind those just committed, front first."""
    entropy: list[float]
    """Of all K slots as they were refined, those just committed first, nats."""
    movement: list[float]
    """‖Δz̃‖/R of all K slots."""
    maturity: list[float]
    """α of all K slots."""


class Generator:
    """A trained model, its vocabulary table and its tokenizer."""

    def __init__(self, config: Config, params: Params, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self._compilations = 0
        self._prefill = jax.jit(self._trace_prefill, static_argnames=("capacity", "max_commit"))
        static = ("num_steps", "record")
        self._advance = jax.jit(self._trace_advance, static_argnames=static, donate_argnames="state")
        # Whoever holds a state may go on from it twice: it is not donated.
        self._step = jax.jit(self._trace_advance, static_argnames=static)
        self._read = jax.jit(self._trace_read)
        self.set_params(params)

    @classmethod
    def from_workdir(cls, workdir: str | Path) -> "Generator":
        """The newest checkpoint of a run; raises UserError where there is none."""
        workdir = Path(workdir)
        config = load_config(workdir)
        tokenizer = load_tokenizer(workdir / TOKENIZER)
        here = replicated(make_mesh(MeshConfig(), jax.local_devices()))
        params, _ = load_params(workdir, param_shapes(config, tokenizer.vocab_size, here))
        return cls(config, params | {"backbone": apart(params["backbone"])}, tokenizer)

    def set_params(self, params: Params) -> None:
        """Other parameters of the same shapes; what is compiled stays."""
        self.params = params
        # Rows are spread over the devices that all hold the parameters.
        table = params["table"]
        whole = isinstance(table, jax.Array) and table.sharding.is_fully_replicated
        self._devices = sorted(table.sharding.device_set, key=lambda device: device.id) if whole else [None]
        self._params = params["backbone"]
        self._vocabulary = vocabulary_of(params, self.config)
        self._logit_scale = ar_logit_scale_of(params, self.config)

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
        self, prompts: Sequence[Prompt], settings: GenerationConfig | None = None, num_samples: int = 1,
        seed: int = 0, batch_size: int = 16, direction: np.ndarray | None = None,
    ) -> list[Sample]:
        """`num_samples` continuations of each of `prompts` (text or ids), in their order.

        A sample depends on its prompt, its number, `seed` and `settings` (None: those of the run), on nothing else.
        An empty prompt starts from end-of-text. `direction` [d], of any norm, is where `settings.steering` draws to;
        None takes the mean of `settings.steering_words`. Raises UserError if the positions do not suffice, for steering
        without a direction, and for any argument that is not of its kind or out of its range.
        """
        settings = self.settings if settings is None else settings
        num_samples, seed, batch_size = counts(num_samples, seed, batch_size)
        rows = self.rows(prompts, settings, num_samples)
        samples: list[Sample | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        for begin in range(0, len(rows), batch_size):
            batch = order[begin : begin + batch_size]
            for index, sample in zip(batch, self._run(rows, batch, settings, seed, direction), strict=True):
                samples[index] = sample
        return [sample for sample in samples if sample is not None]

    def stream(
        self, prompt: Prompt, settings: GenerationConfig | None = None, number: int = 0, seed: int = 0,
        direction: np.ndarray | None = None,
    ) -> Iterator[Moment]:
        """The same sample as `generate`, one step at a time, with its tail; `prompt` is text or ids."""
        partial = self.begin(prompt, settings, number, seed, direction)
        while not partial.done:
            partial, moment = self.step(partial)
            yield moment

    def begin(
        self, prompt: Prompt, settings: GenerationConfig | None = None, number: int = 0, seed: int = 0,
        direction: np.ndarray | None = None,
    ) -> PartialSample:
        """Sample `number` of a prompt before its first step: K embryos. `step` goes on from it, `pin` and `replace`
        change its tail first."""
        settings = self.settings if settings is None else settings
        number, seed = seed_of(number, "number"), seed_of(seed)
        row = dataclasses.replace(self.rows([prompt], settings)[0], number=number)
        state, tail = self._start([row], settings, seed, direction)
        return PartialSample(row, state, tail)

    def step(self, partial: PartialSample) -> tuple[PartialSample, Moment]:
        """`partial` one step later, and what the step did. `partial` itself never changes: callers may step from it again.

        Raises UserError where the sample is complete.
        """
        if partial.done:
            raise UserError("the sample is complete: it has committed end-of-text or spent its budget")
        state, step = self._step(self._params, self._vocabulary, partial.state, partial.tail, num_steps=1,
                                 record=Record(read_tail=True))
        slots, count = np.asarray(step.tokens[0, 0]).tolist(), int(step.committed[0, 0])
        tokens = (*partial.tokens, *slots[:count])
        moment = Moment(
            self.tokenizer.split(partial.row.ids, tokens)[1], list(tokens), count, slots[count:],
            np.asarray(step.entropy[0, 0]).tolist(), np.asarray(step.movement[0, 0]).tolist(),
            np.asarray(partial.tail.maturity).tolist())
        return PartialSample(partial.row, state, partial.tail, tokens), moment

    def pin(self, partial: PartialSample, slot: int, content: Prompt) -> PartialSample:
        """`partial` with slots held at a text, or at ids, from `slot` on: they are committed when they reach the front,
        and until then the slots behind them see them. The front is slot 0. Where end-of-text is committed before, the
        sample ends without them.

        Raises UserError where the text does not fit into the tail or the budget.
        """
        ids = self._ids(content)
        return held_at(partial, slot, ids, self._vectors(ids))

    def replace(self, partial: PartialSample, slot: int, content: Prompt | np.ndarray | jax.Array) -> PartialSample:
        """`partial` with the vectors of slots replaced from `slot` on, by a text, by ids or by vectors [N, d] or [d];
        they go on to be refined, also where they were pinned. Raises UserError where they do not fit into the tail."""
        if isinstance(content, np.ndarray | jax.Array):
            return with_vectors(partial, slot, np.atleast_2d(np.asarray(content)))
        return with_vectors(partial, slot, self._vectors(self._ids(content)))

    def _vectors(self, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(look_up(self._vocabulary.table, jnp.array(ids, jnp.int32)))

    def _ids(self, content: Prompt) -> list[int]:
        if isinstance(content, str):
            ids = self.tokenizer.encode(content) if is_unicode(content) else []
        else:
            ids = ids_of("what goes into the tail", content, self.tokenizer.vocab_size)
        if not ids:
            raise UserError(f"expected a text that is not empty, or at least one id, found {content!r}")
        return ids

    def record(
        self, prompt: Prompt, settings: GenerationConfig | None = None, number: int = 0, seed: int = 0,
        num_candidates: int = 8, keep_vectors: bool = False, direction: np.ndarray | None = None,
    ) -> Trajectory:
        """The same sample as `generate` with everything that its tail went through: the `num_candidates` nearest
        tokens of every slot at every step, and the vectors where they are to be kept.

        Raises UserError as `generate` does, and where there are fewer tokens than candidates.
        """
        num_candidates = whole_number("num_candidates", num_candidates, 0, self.tokenizer.vocab_size)
        partial = self.begin(prompt, settings, number, seed, direction)
        state, steps, kept = partial.state, [], Record(True, num_candidates, keep_vectors)
        count = chunk(int(state.budget[0] - state.num_committed[0]))
        while not bool(state.done[0]):
            state, step = self._advance(self._params, self._vocabulary, state, partial.tail, num_steps=count,
                                        record=kept)
            steps.append(jax.tree.map(np.asarray, step))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
        alive = whole.committed[:, 0] > 0
        measured = {field.name: np.asarray(getattr(whole, field.name))[alive, 0] for field in dataclasses.fields(whole)}
        return Trajectory(prompt=np.asarray(partial.row.ids, np.int32), maturity=np.asarray(partial.tail.maturity),
                          **measured)

    def direction(self, words: Sequence[str]) -> np.ndarray:
        """The mean [d] of the embeddings of some words, as they stand behind a space; a word of several tokens is their
        mean. Raises UserError for a blank one."""
        if isinstance(words, str) or not words:
            raise UserError(f"steering_words must be a list of at least one word, found {words!r}")
        vectors = []
        for word in words:
            if not isinstance(word, str) or not word.strip() or not is_unicode(word):
                raise UserError(f"steering_words: {word!r} is no word")
            vectors.append(direction_of(jnp.asarray(self._vectors(self.tokenizer.encode(f" {word.strip()}")))))
        return np.asarray(direction_of(jnp.stack(vectors)))

    def next_tokens(self, ids: Sequence[int]) -> list[int]:
        """The nearest token to the prediction behind every prefix of `ids` (at least one, at most all positions).

        Committed vectors alone are read, as the baseline does; for a run with a tail that is K = 0. Raises UserError
        for ids that are none, or too few or too many.
        """
        ids = ids_of("what is read", ids, self.tokenizer.vocab_size)
        whole_number("the number of ids", len(ids), 1, self.config.max_positions)
        width = min(bucket(len(ids), SMALLEST_PROMPT), self.config.max_positions)
        padded = np.full((1, width), self.tokenizer.end_of_text, np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self._read(self._params, self._vocabulary, padded))[0, : len(ids)].tolist()

    @property
    def is_autoregressive(self) -> bool:
        """Whether this is the baseline: it has no tail, so K = 1, rate 1, no noise and no guidance. Its predictions
        are vectors all the same, which repulsion may push."""
        return self.config.objective.kind == "ar"

    def rows(
        self, prompts: Sequence[Prompt], settings: GenerationConfig, num_samples: int = 1
    ) -> list[Row]:
        """A Row per prompt and sample; raises UserError unless each prompt is text or ids and has room for `settings`.
        """
        if not isinstance(settings, GenerationConfig):
            raise UserError(f"settings must be a GenerationConfig, found {settings!r}")
        num_samples = whole_number("num_samples", num_samples, 1)
        if settings.repulsion > 0 and not self.config.table.tied:
            raise UserError("repulsion compares tokens as they are read with tokens as they are written, and this "
                            "model has an output table of its own: leave out --repulsion")
        rows, tail_length = [], 1 if self.is_autoregressive else settings.tail_length
        for index, prompt in enumerate(prompts_of(prompts, self.tokenizer.vocab_size)):
            ids = [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
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

    def _tail(self, settings: GenerationConfig, direction: np.ndarray | None) -> Tail:
        if self.is_autoregressive:
            return make_tail(settings.immediate())
        return make_tail(settings, self._direction(settings, direction))

    def check(
        self, prompts: Sequence[Prompt], settings: GenerationConfig, direction: np.ndarray | None = None
    ) -> None:
        """Raises UserError where `generate` would, before anything is computed."""
        self.rows(prompts, settings)
        self._tail(settings, direction)

    def _direction(self, settings: GenerationConfig, direction: np.ndarray | None) -> jax.Array | None:
        """Where steering draws to [d]; None where it is off."""
        if settings.steering == 0.0:
            return None
        if direction is None and not settings.steering_words:
            raise UserError("steering needs a direction: give --steering-words WORD … or --steering-vector FILE")
        try:
            towards = self.direction(settings.steering_words) if direction is None else np.asarray(direction)
        except ValueError:  # lists of several lengths
            towards = np.zeros((), object)
        size = self.config.model.embed_dim
        if (towards.shape != (size,) or towards.dtype.kind not in "fiu" or not np.isfinite(towards).all()
                or not towards.any()):
            raise UserError(f"the steering direction must have {size} finite numbers that are not all 0, found "
                            f"{towards.dtype} of the shape {towards.shape}")
        # Whatever its norm: the largest of its numbers becomes 1 before it meets float32.
        towards = towards.astype(np.float64) / np.abs(towards.astype(np.float64)).max()
        return jnp.asarray(towards, jnp.float32)

    def batch(self, rows: Sequence[Row], max_new_tokens: int, seed: int) -> Batch:
        """`rows` in their bucket of shapes, spread over the devices that hold the model, if these divide it."""
        made = make_batch(rows, max_new_tokens, seed, self.config.max_positions, self.tokenizer.end_of_text)
        arrays = {name: getattr(made, name) for name in ("ids", "lengths", "budgets", "names")}
        return dataclasses.replace(made, **spread(arrays, self._devices))

    def _start(
        self, rows: Sequence[Row], settings: GenerationConfig, seed: int, direction: np.ndarray | None
    ) -> tuple[DecodeState, Tail]:
        """The state behind the prompts of `rows`, and how its tail is run."""
        batch = self.batch(rows, settings.max_new_tokens, seed)
        tail = jax.tree.map(np.asarray, self._tail(settings, direction))
        most = 1 if tail.stability is None else min(settings.max_commit, settings.tail_length)
        state = self._prefill(self._params, self._vocabulary, batch.ids, batch.lengths, batch.budgets, batch.names,
                              tail, capacity=batch.capacity, max_commit=most)
        return state, tail

    def _run(
        self, rows: list[Row], batch: list[int], settings: GenerationConfig, seed: int, direction: np.ndarray | None
    ) -> list[Sample]:
        chosen = [rows[index] for index in batch]
        state, tail = self._start(chosen, settings, seed, direction)
        steps, count = [], chunk(settings.max_new_tokens)
        while not bool(jnp.all(state.done)):
            state, step = self._advance(self._params, self._vocabulary, state, tail, num_steps=count,
                                        record=Record())
            steps.append(jax.tree.map(np.asarray, step))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
        return [self._sample(row, *(part[:, index] for part in (
            whole.committed, whole.tokens, whole.entropy, whole.movement))) for index, row in enumerate(chosen)]

    def _sample(
        self, row: Row, committed: np.ndarray, tokens: np.ndarray, entropy: np.ndarray, movement: np.ndarray
    ) -> Sample:
        """The sample of what N steps committed [N] of their R slots [N, R]."""
        taken = np.arange(tokens.shape[1])[None, :] < committed[:, None]
        ids = tokens[taken].tolist()
        return Sample(row.prompt, row.number, self.tokenizer.split(row.ids, ids)[1], ids, entropy[taken].tolist(),
                      movement[taken].tolist(), ids[-1] == self.tokenizer.end_of_text, int(np.sum(committed > 0)))

    def sample_of(self, prompt: str, number: int, moments: Sequence[Moment]) -> Sample:
        """The sample that all `moments` of a stream (at least one) add up to."""
        tokens = [[*one.tokens[len(one.tokens) - one.committed:], *one.tail] for one in moments]
        measured = (np.array([one.committed for one in moments]), np.array(tokens),
                    np.array([one.entropy for one in moments]), np.array([one.movement for one in moments]))
        return dataclasses.replace(self._sample(Row(prompt, [], number), *measured), text=moments[-1].text)

    def sample_of_trajectory(self, prompt: str, number: int, trajectory: Trajectory) -> Sample:
        """The sample whose tail went through `trajectory`."""
        return self._sample(Row(prompt, trajectory.prompt.tolist(), number), trajectory.committed, trajectory.tokens,
                            trajectory.entropy, trajectory.movement)

    @functools.cached_property
    def _forward(self):
        # Whatever kernel it was trained with, it writes on any machine.
        return make_forward(dataclasses.replace(self.config, compute=ComputeConfig()))

    def _model_tail_length(self, tail: Tail) -> int:
        return 0 if self.is_autoregressive else tail.maturity.shape[0]

    def _trace_prefill(self, params, vocabulary, ids, lengths, budgets, names, tail, capacity, max_commit):
        self._compilations += 1
        tail_length = jnp.full(lengths.shape, self._model_tail_length(tail), jnp.int32)
        vectors = look_up(vocabulary.table, ids)
        model = functools.partial(self._forward, params)
        memory = cache.prefill(model, vectors, tail_length, capacity, tail.repulsion is not None)
        newest = lengths[:, None] - max_commit + jnp.arange(max_commit)[None, :]
        recent = jnp.take_along_axis(vectors, jnp.maximum(newest, 0)[:, :, None], axis=1)
        return start_decoding(jax.vmap(sample_key)(names), recent, lengths, budgets, memory, tail, vocabulary.radius)

    def _trace_read(self, params, vocabulary, ids):
        self._compilations += 1
        batch, width = ids.shape
        positions = jnp.broadcast_to(jnp.arange(width)[None, :], ids.shape)
        prediction, _ = self._forward(params, look_up(vocabulary.table, ids), jnp.ones(ids.shape),
                                      jnp.zeros((batch,), jnp.int32), positions)
        return read(prediction, vocabulary, 1.0)[0]

    def _trace_advance(self, params, vocabulary, state, tail, num_steps, record):
        self._compilations += 1
        model = functools.partial(self._forward, apart(params))  # apart once for all steps of the scan
        predict = cache.cached_predict(model, tail, self._model_tail_length(tail))
        return decode(state, predict, vocabulary, tail, self.tokenizer.end_of_text, num_steps, record)
