"""Text from a run: prompt → buckets → cache → liquid tail → text."""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.config import Config, GenerationConfig, MeshConfig
from tokmat_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokmat_jax.distributed.mesh import make_mesh, replicated, spread
from tokmat_jax.errors import UserError
from tokmat_jax.generation.batches import SMALLEST_PROMPT, Batch, Row, bucket, chunk, in_batches, make_batch, until_done
from tokmat_jax.generation.partial_sample import PartialSample, held_at, with_vectors
from tokmat_jax.generation.programs import Programs
from tokmat_jax.generation.requests import Prompt, counts, ids_of, is_unicode, prompts_of, seed_of, whole_number
from tokmat_jax.generation.samples import Moment, Sample, moment_of, samples_of, trajectory_of
from tokmat_jax.generation.trajectory import Trajectory
from tokmat_jax.method.algorithm import DecodeState, DecodeStep, Record
from tokmat_jax.method.steering import direction_of
from tokmat_jax.method.table import Vocabulary, look_up
from tokmat_jax.method.tail import Tail, make_tail
from tokmat_jax.model.backbone import Params, unstack_blocks
from tokmat_jax.model.params import ar_logit_scale_of, vocabulary_of
from tokmat_jax.storage.model import load_plain
from tokmat_jax.storage.workdir import TOKENIZER, load_config


def settings_of(config: Config) -> GenerationConfig:
    """Default generation settings of a run: its `generation`. The default of a baseline is plain greedy decoding: it
    ignores the repulsion that the maturation run of the same config uses."""
    own = config.generation
    if config.objective.kind == "ar":
        return dataclasses.replace(own, repulsion=0.0).immediate()
    if config.objective.kind == "tail":
        return dataclasses.replace(own, commit="verified", model_tail_length=0)
    return _told(own, config)


def _told(settings: GenerationConfig, config: Config) -> GenerationConfig:
    """`settings` with the K that a model of many tails per window was told at committed positions: 0."""
    if config.maturation.num_tails == 0 or settings.model_tail_length is not None:
        return settings
    return dataclasses.replace(settings, model_tail_length=0)


class Generator:
    """A trained model, its vocabulary table and its tokenizer."""

    def __init__(self, config: Config, params: Params, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.programs = Programs(config, tokenizer.ends)
        self.set_params(params)

    @classmethod
    def from_workdir(cls, workdir: str | Path) -> "Generator":
        """A generator from the newest checkpoint of a run; raises UserError if there is none."""
        workdir = Path(workdir)
        load_config(workdir)  # a folder that is no run is refused by its first file
        tokenizer = load_tokenizer(workdir / TOKENIZER)
        here = replicated(make_mesh(MeshConfig(), jax.local_devices()))
        params, config = load_plain(workdir, tokenizer.vocab_size, here)
        return cls(config, params | {"backbone": unstack_blocks(params["backbone"])}, tokenizer)

    @classmethod
    def from_pretrained(cls, source: str) -> "Generator":
        """A generator from a checkpoint: a folder, a .gguf file, a name on the hub, or package:NAME.

        Raises UserError as an import does. To load it many times, import it once (`hf import`).
        """
        from tokmat_jax.hf.convert import import_weights

        with tempfile.TemporaryDirectory() as scratch:
            import_weights(source, Path(scratch, "import"))
            return cls.from_workdir(Path(scratch, "import"))

    def set_params(self, params: Params) -> None:
        """Replaces the parameters by others of the same shapes; compiled programs are kept."""
        self.params = params
        # Every device holds the parameters; the rows are spread over the devices.
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
        """The vocabulary table, which reads and writes tokens."""
        return self._vocabulary

    @property
    def logit_scale(self) -> jax.Array:
        """Factor [] of ⟨ẑ, e_i⟩ in the logits of a baseline."""
        return self._logit_scale

    @property
    def settings(self) -> GenerationConfig:
        """Default generation settings, see `settings_of`."""
        return settings_of(self.config)

    def compilations(self) -> int:
        """Number of shapes compiled so far."""
        return self.programs.traced.total()

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationConfig | None = None, num_samples: int = 1,
        seed: int = 0, batch_size: int = 16, direction: np.ndarray | None = None,
    ) -> list[Sample]:
        """`num_samples` continuations of each of `prompts` (text or ids), in their order.

        A sample depends only on its prompt, its number, `seed` and `settings` (None: those of the run).
        An empty prompt starts from end-of-text. `settings.steering` pulls the text towards `direction` [d], of any
        norm; None takes the mean of `settings.steering_words`. Raises UserError if the model has too few positions, if
        steering has no direction, and if an argument has the wrong type or is out of range.
        """
        settings = self.settings if settings is None else settings
        num_samples, seed, batch_size = counts(num_samples, seed, batch_size)
        rows = self.rows(prompts, settings, num_samples)
        return in_batches(rows, [len(row.ids) for row in rows], lambda _: (batch_size, self.config.max_positions),
                          lambda batch: self._run(batch, settings, seed, direction))

    def stream(
        self, prompt: Prompt, settings: GenerationConfig | None = None, number: int = 0, seed: int = 0,
        direction: np.ndarray | None = None,
    ) -> Iterator[Moment]:
        """Yields the same sample as `generate`, one step at a time, with its tail; `prompt` is text or ids."""
        partial = self.begin(prompt, settings, number, seed, direction)
        while not partial.done:
            partial, moment = self.step(partial)
            yield moment

    def begin(
        self, prompt: Prompt, settings: GenerationConfig | None = None, number: int = 0, seed: int = 0,
        direction: np.ndarray | None = None,
    ) -> PartialSample:
        """Sample `number` of a prompt before its first step: K embryos. `step` advances it; `pin` and `replace` change
        its tail."""
        settings = self.settings if settings is None else settings
        number, seed = seed_of(number, "number"), seed_of(seed)
        row = dataclasses.replace(self.rows([prompt], settings)[0], number=number)
        state, tail = self._start([row], settings, seed, direction)
        return PartialSample(row, state, tail)

    def step(self, partial: PartialSample) -> tuple[PartialSample, Moment]:
        """`partial` one step later, and what the step did. `partial` never changes: callers may step from it again.

        Raises UserError if the sample is complete.
        """
        if partial.done:
            raise UserError("the sample is complete: it has committed end-of-text or spent its budget")
        state, step = self.programs.step(self._params, self._vocabulary, partial.state, partial.tail, num_steps=1,
                                         record=Record(read_tail=True))
        moment = moment_of(self.tokenizer, partial.row.ids, partial.tokens, step, np.asarray(partial.tail.maturity))
        return dataclasses.replace(partial, state=state, tokens=tuple(moment.tokens)), moment

    def pin(self, partial: PartialSample, slot: int, content: Prompt) -> PartialSample:
        """Pins the slots of `partial` from `slot` on (0 is the front) to a text or to ids.

        Pinned slots are committed when they reach the front; until then, later slots see them. If end-of-text is
        committed first, the sample ends without them. Raises UserError if the text does not fit into the tail or the
        budget.
        """
        ids = self._ids(content)
        return held_at(partial, slot, ids, self._vocabulary)

    def replace(self, partial: PartialSample, slot: int, content: Prompt | np.ndarray | jax.Array) -> PartialSample:
        """Replaces the vectors of the slots of `partial` from `slot` on by a text, by ids or by vectors [N, d] or [d].
        Later steps refine them, even if they were pinned. Raises UserError if they do not fit into the tail."""
        if isinstance(content, np.ndarray | jax.Array):
            vectors = np.atleast_2d(np.asarray(content))
        else:
            vectors = self._vectors(self._ids(content))
        return with_vectors(partial, slot, vectors, self._vocabulary)

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
        """The same sample as `generate`, with the full history of its tail: the `num_candidates` nearest tokens of
        every slot at every step, and the vectors if requested.

        Raises UserError as `generate` does, and if the vocabulary has fewer tokens than candidates.
        """
        num_candidates = whole_number("num_candidates", num_candidates, 0, self.tokenizer.vocab_size)
        partial = self.begin(prompt, settings, number, seed, direction)
        left = int(partial.state.budget[0] - partial.state.num_committed[0])
        steps = self._finish(partial.state, partial.tail, left, Record(True, num_candidates, keep_vectors))
        return trajectory_of(partial.row.ids, np.asarray(partial.tail.maturity), steps)

    def direction(self, words: Sequence[str]) -> np.ndarray:
        """Mean [d] of the embeddings of `words`, each encoded with a leading space; a word of several tokens counts as
        their mean. Raises UserError if a word is blank."""
        if isinstance(words, str) or not words:
            raise UserError(f"steering_words must be a list of at least one word, found {words!r}")
        vectors = []
        for word in words:
            if not isinstance(word, str) or not word.strip() or not is_unicode(word):
                raise UserError(f"steering_words: {word!r} is no word")
            vectors.append(direction_of(jnp.asarray(self._vectors(self.tokenizer.encode(f" {word.strip()}")))))
        return np.asarray(direction_of(jnp.stack(vectors)))

    @property
    def told_tail_length(self) -> int:
        """The K that the model is told at committed positions when it generates with its own settings."""
        told = _told(self.settings, self.config).model_tail_length
        return 0 if self.is_autoregressive else self.settings.tail_length if told is None else told

    def next_tokens(self, ids: Sequence[int]) -> list[int]:
        """The nearest token to the prediction after every prefix of `ids` (at least one, at most `max_positions`).

        The model reads only committed vectors, as the baseline does; for a run with a tail this means K = 0. Raises
        UserError if `ids` is not a list of ids, or is too short or too long.
        """
        ids = ids_of("what is read", ids, self.tokenizer.vocab_size)
        whole_number("the number of ids", len(ids), 1, self.config.max_positions)
        width = min(bucket(len(ids), SMALLEST_PROMPT), self.config.max_positions)
        padded = np.full((1, width), self.tokenizer.end_of_text, np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self.programs.read(self._params, self._vocabulary, padded))[0, : len(ids)].tolist()

    @property
    def is_autoregressive(self) -> bool:
        """Whether this is the baseline: it has no tail, so K = 1, rate 1, no noise and no guidance. Its predictions
        are vectors too, so repulsion can push them."""
        return self.config.objective.kind == "ar"

    def rows(
        self, prompts: Sequence[Prompt], settings: GenerationConfig, num_samples: int = 1
    ) -> list[Row]:
        """A Row per prompt and sample; raises UserError unless each prompt is text or ids and has room for `settings`.
        """
        if not isinstance(settings, GenerationConfig):
            raise UserError(f"settings must be a GenerationConfig, found {settings!r}")
        num_samples = whole_number("num_samples", num_samples, 1)
        if (self.config.objective.kind == "tail" and settings.commit != "verified"
                and (settings.tail_length, settings.rate) != (1, 1.0)):
            raise UserError(f"a tail in front of a language model never changes what that writes: commit must be "
                            f"'verified', found {settings.commit!r}")
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
        return make_tail(_told(settings, self.config), self._direction(settings, direction))

    def check(
        self, prompts: Sequence[Prompt], settings: GenerationConfig, direction: np.ndarray | None = None
    ) -> None:
        """Raises UserError if `generate` would, before anything is computed."""
        self.rows(prompts, settings)
        self._tail(settings, direction)

    def _direction(self, settings: GenerationConfig, direction: np.ndarray | None) -> jax.Array | None:
        """Direction [d] of the steering; None if steering is off."""
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
        # Any norm is allowed: scale the largest entry to 1 before the cast to float32.
        towards = towards.astype(np.float64) / np.abs(towards.astype(np.float64)).max()
        return jnp.asarray(towards, jnp.float32)

    def batch(self, rows: Sequence[Row], max_new_tokens: int, seed: int) -> Batch:
        """Pads `rows` to their bucket and shards them over the devices that hold the model, if these divide the
        batch."""
        made = make_batch(rows, max_new_tokens, seed, self.config.max_positions, self.tokenizer.end_of_text)
        arrays = {name: getattr(made, name) for name in ("ids", "lengths", "budgets", "names")}
        return dataclasses.replace(made, **spread(arrays, self._devices))

    def _start(
        self, rows: Sequence[Row], settings: GenerationConfig, seed: int, direction: np.ndarray | None
    ) -> tuple[DecodeState, Tail]:
        """The state after the prompts of `rows`, and the settings of its tail."""
        batch = self.batch(rows, settings.max_new_tokens, seed)
        tail = jax.tree.map(np.asarray, self._tail(settings, direction))
        most = 1 if tail.stability is None else min(settings.max_commit, settings.tail_length)
        state = self.programs.prefill(self._params, self._vocabulary, batch.ids, batch.lengths, batch.budgets,
                                      batch.names, tail, capacity=batch.capacity, max_commit=most)
        return state, tail

    def _run(
        self, rows: Sequence[Row], settings: GenerationConfig, seed: int, direction: np.ndarray | None
    ) -> list[Sample]:
        """Generates `rows` to their end as one batch."""
        state, tail = self._start(rows, settings, seed, direction)
        return samples_of(self.tokenizer, rows, self._finish(state, tail, settings.max_new_tokens, Record()))

    def _finish(self, state: DecodeState, tail: Tail, max_new_tokens: int, record: Record) -> DecodeStep:
        """Steps [N, B, …] until all rows of `state` are done; `state` is donated."""
        num_steps = chunk(max_new_tokens, one_a_step=tail.stability is None and tail.verification is None)
        return until_done(state, functools.partial(self._advance, tail, num_steps, record))

    def _advance(
        self, tail: Tail, num_steps: int, record: Record, state: DecodeState
    ) -> tuple[DecodeState, DecodeStep]:
        return self.programs.advance(self._params, self._vocabulary, state, tail, num_steps=num_steps, record=record)
