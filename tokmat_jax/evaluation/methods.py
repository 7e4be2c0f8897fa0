"""The rows of the report: methods of generation, and the settings along the curve of each method."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tokmat_jax.config import GenerationConfig
from tokmat_jax.evaluation.measurement import Options
from tokmat_jax.evaluation.pair import Prompts
from tokmat_jax.generation.baselines import Baselines
from tokmat_jax.generation.generator import Generator

PLAIN: dict[str, Any] = dataclasses.asdict(GenerationConfig())
"""The plain algorithm: the defaults of GenerationConfig (METHOD §3)."""


@dataclass(frozen=True)
class Method:
    """One method of generation with its settings."""

    name: str
    kind: Literal["human", "sampling", "contrastive", "best_of", "repulsion", "maturation"]
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of the decoder: those of `Baselines`' methods, or fields of GenerationConfig over its defaults
    (`repulsion` and `maturation`)."""
    curve: str = ""
    """Name of its curve on the frontier; empty if it is only a row of the table."""

    @property
    def identity(self) -> list[Any]:
        """Kind and settings without the name: two methods with the same identity generate the same text."""
        neutral = {"sampling": {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}, "maturation": PLAIN}
        return [self.kind, neutral.get(self.kind, {}) | self.settings]

    @property
    def is_baseline(self) -> bool:
        """Whether the autoregressive baseline generates."""
        return self.kind not in ("human", "maturation")

    @property
    def is_sampling(self) -> bool:
        """Whether it belongs to the curves of ordinary sampling, against which the signed area is measured."""
        return self.curve in ("temperature", "nucleus")

    @property
    def is_deterministic(self) -> bool:
        """Whether all samples of a prompt are equal."""
        greedy = self.kind == "sampling" and self.settings.get("temperature", 0.0) == 0.0
        return greedy or self.kind in ("human", "contrastive", "repulsion")


HUMAN = Method("human", "human")
PLAIN_MATURATION = Method("plain", "maturation")
_STRONG = {"tail_noise": 1.0, "max_maturity": 0.5}
"""Settings with strong embryos and a low rate."""
_REPULSIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
_SETTLED = ((3, 9.0), (2, 9.0), (1, 9.0), (3, 0.4), (2, 0.4), (1, 0.4), (0, 0.2), (0, 0.25), (0, 0.3), (0, 0.4))
"""Pairs of patience and tolerance of stable commits. A tolerance of 9 is off: no slot ever moves by 9 R."""


def _maturation(name: str, curve: str = "", **settings: Any) -> Method:
    return Method(name, "maturation", settings, curve)


def table_methods(own: GenerationConfig, room: int) -> list[Method]:
    """The rows of the table, without tails longer than `room` positions. `own` is the run's own setting."""
    own_settings = {name: value for name, value in dataclasses.asdict(own).items() if PLAIN[name] != value}
    for name in ("max_new_tokens", "entropy_temperature"):
        own_settings.pop(name, None)
    plain = GenerationConfig().tail_length
    rows = [
        HUMAN,
        Method("greedy", "sampling", {}),
        Method("greedy, penalty 1.2", "sampling", {"repetition_penalty": 1.2}),
        Method("temperature 1", "sampling", {"temperature": 1.0}),
        Method("nucleus 0.95", "sampling", {"temperature": 1.0, "top_p": 0.95}),
        Method("contrastive search", "contrastive", {"top_k": 5, "alpha": 0.6}),
        Method("best of 16", "best_of", {"count": 16}),
        Method("greedy, repulsion 0.4", "repulsion", {"repulsion": 0.4}),
        _maturation("maturation, the run's setting", **own_settings),
        _maturation(f"maturation, plain (K {plain})"),
        _maturation("plain, guidance 2", guidance_scale=2.0),
        _maturation("plain, repulsion 0.4", repulsion=0.4),
        *(_maturation(f"plain, K {length}", tail_length=length) for length in (1, 4, 16, 64)),
    ]
    return [row for row in rows if _tail_length(row) <= room]


def curve_methods(room: int) -> list[Method]:
    """The settings of the frontier's curves, without tails longer than `room` positions."""
    baseline = [Method(f"temperature {t:g}", "sampling", {"temperature": t}, "temperature")
                for t in (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    baseline += [Method(f"nucleus {p:g}", "sampling", {"temperature": 1.0, "top_p": p}, "nucleus")
                 for p in (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)]
    baseline += [Method(f"greedy, penalty {p:g}", "sampling", {"repetition_penalty": p}, "penalty")
                 for p in (1.05, 1.1, 1.2, 1.3, 1.5)]
    baseline += [Method(f"greedy, repulsion {r:g}", "repulsion", {"repulsion": r}, "repulsion of the baseline")
                 for r in _REPULSIONS]
    ours = [_maturation(f"repulsion {r:g}", "repulsion", repulsion=r) for r in _REPULSIONS]
    ours += [_maturation(f"guidance {s:g}", "guidance", guidance_scale=s) for s in (1.0, 1.5, 2.0, 2.5, 3.0)]
    ours += [_maturation(f"tail noise {n:g}", "tail noise", tail_length=2, tail_noise=n, max_maturity=0.5)
             for n in (0.3, 0.5, 0.7, 0.85, 1.0)]
    ours += [_maturation(f"history noise {n:g}", "history noise", history_noise=n) for n in (0.0, 0.25, 0.5, 0.75)]
    ours += [_maturation(f"rate {r:g}", "rate", tail_length=2, tail_noise=1.0, rate=r) for r in (0.4, 0.5, 0.6, 0.8)]
    ours += [_maturation(f"fresh noise {n:g}", "fresh noise", fresh_noise=n) for n in (0.25, 0.5, 1.0, 2.0)]
    ours += [_maturation(f"history smoothing {h:g}", "history smoothing", history_smoothing=h)
             for h in (0.1, 0.2, 0.3, 0.4)]
    ours += [_maturation(f"steering {g:g} to peace", "steering", steering=g, steering_words=("peace",))
             for g in (0.05, 0.1, 0.2, 0.3)]
    ours += [_maturation(f"K {length}", "tail length", tail_length=length) for length in (1, 2, 4, 8, 16)]
    ours += [method for method in stable_methods() if method.curve == STABLE]
    for length in (1, 2, 4):
        ours += [_maturation(f"K {length}, α_max {a:g}", f"σ 1, K {length}, by α_max", tail_length=length,
                             **(_STRONG | {"max_maturity": a})) for a in (0.9, 0.7, 0.6, 0.55, 0.5)]
    return [method for method in baseline + ours if _tail_length(method) <= room]


STABLE, STABLE_REPELLED = "stable commits", "stable commits, repulsion 0.4"


def stable_methods() -> list[Method]:
    """Stable commits of up to four tokens, by patience and tolerance: for the plain algorithm, and with repulsion. The
    first setting of each curve commits one token a step."""
    found = []
    for curve, base in ((STABLE, {}), (STABLE_REPELLED, {"repulsion": 0.4})):
        found.append(_maturation(f"{curve}: one a step", curve, **base))
        found += [_maturation(f"{curve}: patience {patience}, tolerance {tolerance:g}", curve, commit="stable",
                              patience=patience, tolerance=tolerance, **base) for patience, tolerance in _SETTLED]
    return found


def _tail_length(method: Method) -> int:
    return method.settings.get("tail_length", PLAIN["tail_length"]) if method.kind == "maturation" else 1


@dataclass(frozen=True)
class Written:
    """The continuations of N prompts by one method."""

    tokens: list[list[int]]
    """Ids of the run's tokenizer, at most L per prompt, without end-of-text."""
    finished: list[bool]
    """Whether each text ended with end-of-text."""
    entropy: list[float] | None
    """Mean entropy at commit in nats, per prompt; None if the decoder does not report it."""
    passes: list[int] | None = None
    """Number of steps of each text; None if they were not counted."""

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens, end-of-text included, per step; 1 if steps were not counted."""
        committed = sum(map(len, self.tokens)) + sum(self.finished)
        return committed / sum(self.passes) if self.passes else 1.0


class Writer:
    """Continues the same prompts with every method."""

    def __init__(self, run: Generator, baseline: Generator, options: Options):
        self.run, self.baseline = run, baseline
        self._decoder = Baselines(baseline)
        self._same_ids = run.tokenizer.same_ids(baseline.tokenizer)
        self._new, self._seed, self._batch_size = options.max_new_tokens, options.seed, options.batch_size
        self._least = self._new if options.forbid_end_of_text else 0

    def settings(self, method: Method, max_new_tokens: int | None = None) -> GenerationConfig:
        """The generation settings of a maturation `method`."""
        least = 0 if max_new_tokens else self._least
        fields: dict[str, Any] = PLAIN | method.settings | {
            "max_new_tokens": max_new_tokens or self._new, "min_new_tokens": least}
        return GenerationConfig(**fields)

    def write(self, method: Method, prompts: Prompts) -> Written:
        """One continuation per prompt."""
        if method.kind == "human":
            return Written(prompts.human, [False] * len(prompts.human), None)
        if method.kind == "maturation":
            found = self.run.generate(prompts.ids, self.settings(method), seed=self._seed, batch_size=self._batch_size)
            tokens = [one.tokens[:-1] if one.finished else one.tokens for one in found]
            return Written(tokens, [one.finished for one in found], [float(np.mean(one.entropy)) for one in found],
                           [one.passes for one in found])
        tokens, finished = self._baseline(method, prompts.ids, self._new, self._seed, 1, self._least)
        return Written(tokens, finished, None)

    def first_tokens(self, method: Method, contexts: Sequence[Sequence[int]], ahead: int, samples: int) -> np.ndarray:
        """The first `ahead` ids of `samples` independent continuations of each context [C, samples, ahead].

        Ids after end-of-text are −1. A deterministic method generates once, and its result is repeated.
        """
        once = method.is_deterministic
        if method.kind == "maturation":
            settings = self.settings(method, ahead)
            rows = [one.tokens for one in self.run.generate(contexts, settings, samples, self._seed, self._batch_size)]
        elif method.kind == "best_of":  # every sample is the best of its own candidates
            several = [self._first(method, contexts, ahead, (self._seed + number) % 2**32, 1)
                       for number in range(samples)]
            rows = [tokens for together in zip(*several, strict=True) for tokens in together]
        else:
            rows = self._first(method, contexts, ahead, self._seed, 1 if once else samples)
        padded = np.full((len(rows), ahead), -1)
        for index, tokens in enumerate(rows):
            padded[index, : len(tokens)] = tokens[:ahead]
        grouped = padded.reshape(len(contexts), -1, ahead)
        return np.repeat(grouped, samples, axis=1) if once else grouped

    def _first(
        self, method: Method, contexts: Sequence[Sequence[int]], ahead: int, seed: int, samples: int
    ) -> list[list[int]]:
        """The ids that the baseline generates, with end-of-text if it ended."""
        end = [self.run.tokenizer.end_of_text]
        written = zip(*self._baseline(method, contexts, ahead, seed, samples), strict=True)
        return [[*tokens, *end] if finished else tokens for tokens, finished in written]

    def _baseline(
        self, method: Method, prompts: Sequence[Sequence[int]], length: int, seed: int, samples: int, least: int = 0
    ) -> tuple[list[list[int]], list[bool]]:
        ours = self.run.tokenizer
        given = prompts if self._same_ids else [ours.decode(ids) for ids in prompts]
        size = self._batch_size
        match method.kind:
            case "contrastive":
                found = self._decoder.contrastive(given, length, batch_size=size, min_new_tokens=least,
                                                  **method.settings)
            case "best_of":
                found = self._decoder.best_of(given, length, seed=seed, batch_size=size, min_new_tokens=least,
                                              **method.settings)
            case "repulsion":
                settings = GenerationConfig(max_new_tokens=length, min_new_tokens=least, **method.settings)
                found = self.baseline.generate(given, settings, batch_size=size)
            case _:
                found = self._decoder.sample(given, length, num_samples=samples, seed=seed, batch_size=size,
                                             min_new_tokens=least, **method.settings)
        tokens = [one.tokens[:-1] if one.finished else one.tokens for one in found]
        if not self._same_ids:
            before = [ids for ids in prompts for _ in range(len(found) // len(prompts))]
            tokens = [ours.encode_after(ids, one.text)[:length] for ids, one in zip(before, found, strict=True)]
        return tokens, [one.finished for one in found]
