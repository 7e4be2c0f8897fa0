"""The report card as data: every method continues the same prompts, and its text is judged and measured."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokmat_jax.config import GenerationConfig
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation import figures, frontier, metrics, scores
from tokmat_jax.evaluation.gap import measure_gap
from tokmat_jax.evaluation.judge import Judge, perplexity
from tokmat_jax.evaluation.methods import (
    HUMAN,
    Method,
    Writer,
    Written,
    curve_methods,
    stable_methods,
    table_methods,
)
from tokmat_jax.evaluation.pair import Prompts
from tokmat_jax.evaluation.passes import timed, verified_cases
from tokmat_jax.evaluation.store import Store
from tokmat_jax.generation.generator import Generator
from tokmat_jax.keys import seed_key
from tokmat_jax.model.params import init_params, vocabulary_of
from tokmat_jax.storage.npy import open_npy

_BRIER = {"contexts": 4, "ahead": 4, "samples": 4}
"""Contexts per prompt, tokens generated after each context, and independent samples of them."""
_SCALES = (1.0, 2.0)
_BATCHES = (1, 8)
"""Rows that write together if speed is measured."""
_SHORT_ROWS = ("human", "greedy", "nucleus 0.95", "plain, guidance 2", "plain, repulsion 0.4")
_SHORT_CURVES = ("temperature", "nucleus", "penalty", "repulsion of the baseline", "repulsion", "guidance",
                 "σ 1, K 1, by α_max")


@dataclass(frozen=True)
class Options:
    """Options from the command line."""

    max_new_tokens: int
    seed: int
    resamples: int
    batch_size: int
    prompt: str
    """Prompt for the article's figures."""
    num_seeds: int
    """Number of samples of that prompt, for the figures over seeds."""


def _nobody(done: int, name: str) -> None:
    pass


class Card:
    """One evaluation."""

    def __init__(
        self, run: Generator, baseline: Generator, judge: Judge, prompts: Prompts, store: Store, options: Options,
        baseline_store: Store | None = None,
    ):
        """The baseline's text is kept in `baseline_store`, which several cards may share; None means `store`."""
        self.run, self.baseline, self.judge = run, baseline, judge
        self.prompts, self.options = prompts, options
        self._store, self._baseline_store = store, baseline_store or store
        self._done, self._told = 0, _nobody
        self._writer = Writer(run, baseline, options.max_new_tokens, options.seed, options.batch_size)
        self._reader = Judge(baseline)
        self._room = run.config.max_positions - len(prompts.ids[0]) - options.max_new_tokens
        one_step = dataclasses.replace(run.config.generation.with_tail_length(1), max_new_tokens=1)
        self._figure_room = run.config.max_positions - len(run.rows([options.prompt], one_step)[0].ids)
        if self._figure_room < 8:
            raise UserError(f"--prompt has {run.config.max_positions - self._figure_room} tokens, which leaves "
                            f"{self._figure_room} of the model's {run.config.max_positions} positions: shorten it")
        self.table = table_methods(run.config.generation, self._room)
        self.curves = curve_methods(self._room)
        self.stable = stable_methods() if self._room >= GenerationConfig().tail_length else []

    def num_parts(self) -> int:
        """How many parts there are."""
        return 2 * len(self.table) + len(self.curves) + len(self.stable) + len(self._verified_cases()) + 9

    def data(self, told: Callable[[int, str], None]) -> dict[str, Any]:
        """All parts of the report. Parts that an earlier, interrupted evaluation finished are read from the store.

        `told` is called after each part with the number of finished parts and the name of the latest.
        """
        self._done, self._told = 0, told
        rows = [self._row(method) for method in self.table]
        figure = self._figures()
        return {
            "rows": rows, "calibration": self._part("calibration", "calibration", None,
                                                                  self._calibration),
            "frontier": self._frontier(self.curves), "passes": self._passes(),
            "verified": self._verified(), "figures": figure,
            "gap": self._part("gap", "gap", None, self._gap),
            "judge": {"is_baseline": self.judge.generator is self.baseline,
                      "num_parameters": num_parameters(self.judge.generator)},
            "brier_note": _brier_note(len(self.prompts.ids), rows),
            "log_vocabulary": float(np.log(self.run.tokenizer.vocab_size)),
        }

    def num_short_parts(self) -> int:
        """Number of parts of `short`."""
        return len(self._short_rows()) + len(self._short_curves()) + 2

    def _short_rows(self) -> list[Method]:
        names = (*_SHORT_ROWS, f"maturation, plain (K {GenerationConfig().tail_length})")
        return [method for method in self.table if method.name in names]

    def _short_curves(self) -> list[Method]:
        return [method for method in self.curves if method.curve in _SHORT_CURVES]

    def short(self, told: Callable[[int, str], None]) -> dict[str, Any]:
        """The short card of an experiment: the scores of a few rows, a few curves of the frontier, the lookahead."""
        self._done, self._told = 0, told
        rows = {method.name: {name: dataclasses.asdict(value) for name, value in
                              self._values(*self._written(method)).items()} for method in self._short_rows()}
        return {"rows": rows, "frontier": self._frontier(self._short_curves()), "lookahead": self._lookahead()}

    def _part(self, name: str, kind: str, settings: Any, make: Callable[[], Any], store: Store | None = None) -> Any:
        """The part of a `kind` under `settings`; `name` is shown to the user."""
        found = (store or self._store).get(kind, settings, make)
        self._done += 1
        self._told(self._done, name)
        return found

    # Samples and their scores

    def _written(self, method: Method) -> tuple[Written, np.ndarray, np.ndarray]:
        """The samples of a method, and for each sample [N] its nats under the judge and its number of judge tokens."""

        def make():
            written = self._writer.write(method, self.prompts)
            if method.is_baseline:
                pairs = list(zip(self.prompts.ids, written.tokens, strict=True))
                entropy = [one.entropy for one in self._reader.read_ids(pairs)] if self._same(self.baseline) else []
                written = dataclasses.replace(written, entropy=[
                    float(one.mean()) if one.size else float("nan") for one in entropy] or None)
            nats = [one.nats for one in self._judge_tokens(written.tokens)]
            return {"written": dataclasses.asdict(written), "nats": [float(one.sum()) for one in nats],
                    "judge_tokens": [one.size for one in nats]}

        found = self._part(method.name, "written", method.identity, make,
                           self._baseline_store if method.is_baseline else None)
        written = Written(**found["written"])
        return written, np.array(found["nats"], np.float64), np.array(found["judge_tokens"])

    def _same(self, other: Generator) -> bool:
        return self.run.tokenizer.same_ids(other.tokenizer)

    def _judge_tokens(self, tokens: Sequence[Sequence[int]]):
        if self._same(self.judge.generator):
            return self.judge.read_ids(list(zip(self.prompts.ids, tokens, strict=True)))
        return self.judge.read_texts(self._texts(tokens))

    def _texts(self, tokens: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
        """The text of each prompt, and the text that `tokens` add to it."""
        return [self.run.tokenizer.split(*pair) for pair in zip(self.prompts.ids, tokens, strict=True)]

    def _values(self, written: Written, nats: np.ndarray, judge_tokens: np.ndarray) -> dict[str, scores.Value]:
        texts = [text for _, text in self._texts(written.tokens)]
        return scores.values(written, texts, nats, judge_tokens, self.options.max_new_tokens, self.options.resamples)

    def _row(self, method: Method) -> dict[str, Any]:
        written, nats, judge_tokens = self._written(method)
        options = self.options
        values = self._values(written, nats, judge_tokens)
        sampled = self._part(f"{method.name}: repeated samples", "repeated", [*method.identity, _BRIER],
                             lambda: self._repeated(method))
        per_context = np.array(sampled["brier"]) if sampled["brier"] else None
        return {
            "name": method.name, "kind": method.kind, "settings": method.settings,
            "values": {name: dataclasses.asdict(value) for name, value in values.items()},
            "full": sum(len(tokens) == options.max_new_tokens for tokens in written.tokens),
            "brier": None if per_context is None else {
                name: dataclasses.asdict(value) for name, value in
                scores.brier_values(per_context, _BRIER["contexts"], options.resamples).items()},
            "mauve": self._store.get("mauve", method.identity, lambda: self._mauve(written))
            if scores.has_mauve() and method != HUMAN and len(written.tokens) >= scores.FEWEST_FOR_MAUVE else None,
            "samples": self._texts(written.tokens)[:3],
        }

    def _repeated(self, method: Method) -> dict[str, Any]:
        """Brier-n of every context."""
        if method == HUMAN:
            return {"brier": None}
        contexts, after = self.prompts.contexts(_BRIER["contexts"], _BRIER["ahead"])
        samples = self._writer.first_tokens(method, contexts, _BRIER["ahead"], _BRIER["samples"])
        brier = [metrics.brier(one, truth).tolist() for one, truth in zip(samples, after, strict=True)]
        return {"brier": brier}

    def _mauve(self, written: Written) -> tuple[float, float]:
        return scores.mauve(self._human_endings, self._endings(written.tokens))

    @functools.cached_property
    def _human_endings(self) -> np.ndarray:
        return self._endings(self.prompts.human)

    def _endings(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors [N, d] that represent the texts: the judge's prediction after each."""
        return np.stack([one.ending for one in self._judge_tokens(tokens)])

    def _calibration(self) -> dict[str, float]:
        """The judge's perplexity of the human text, and of the same text with shuffled sentences."""
        decode = self.run.tokenizer.decode
        pairs = [(decode(p), decode(h)) for p, h in zip(self.prompts.ids, self.prompts.human, strict=True)]
        shuffled = [(p, shuffle_sentences(h, seed)) for seed, (p, h) in enumerate(pairs)]
        return {name: perplexity(self.judge.read_texts(texts))
                for name, texts in (("human", pairs), ("shuffled", shuffled))}

    # Tokens per pass against quality

    def _passes(self) -> list[dict[str, Any]]:
        """Tokens per pass of stable commits, and their cost in quality."""
        found = []
        for method in self.stable:
            written, nats, judge_tokens = self._written(method)
            measured = scores.per_prompt(written, self.options.max_new_tokens)
            found.append({
                "curve": method.curve, "label": method.name, "tokens_per_pass": written.tokens_per_pass,
                "perplexity": float(np.exp(nats.sum() / judge_tokens.sum())) if judge_tokens.sum() else float("nan"),
                "rep_3": scores.nan_mean(measured["rep_3"]),
                "periodic_loop": scores.nan_mean(measured["periodic_loop"])})
        return found

    def _verified_cases(self) -> list[tuple[str, int, GenerationConfig]]:
        """(name, batch size, settings) of what verified commits are measured in."""
        if not self.stable:  # there is no room for a tail
            return []
        base = dataclasses.replace(GenerationConfig(), max_new_tokens=self.options.max_new_tokens)
        return [(f"{name}{', repulsion 0.4' * (repulsion > 0)}", batch_size, settings) for repulsion in (0.0, 0.4)
                for batch_size in _BATCHES
                for name, settings in verified_cases(dataclasses.replace(base, repulsion=repulsion), (3,)).items()]

    def _verified(self) -> list[dict[str, Any]]:
        """Tokens a pass and speed of verified commits, on a few of the prompts."""
        found = []
        for name, batch_size, settings in self._verified_cases():
            prompts = self.prompts.ids[: 2 * batch_size]
            made = self._part(f"verified: {name}, batch {batch_size}", "verified",
                              [dataclasses.asdict(settings), batch_size],
                              lambda prompts=prompts, settings=settings, batch_size=batch_size: timed(
                                  self.run, prompts, settings, batch_size))
            found.append({"label": name, "batch_size": batch_size, **made})
        return found

    # Repetition against perplexity

    def _frontier(self, methods: Sequence[Method]) -> dict[str, Any]:
        found = [self._written(method) for method in methods]
        length, resamples = self.options.max_new_tokens, self.options.resamples
        settings = frontier.Settings(
            [method.name for method in methods],
            np.array([scores.per_prompt(written, length)["rep_3"] for written, _, _ in found]),
            np.array([nats for _, nats, _ in found]), np.array([tokens for _, _, tokens in found]))
        curves = {name: [i for i, method in enumerate(methods) if method.curve == name]
                  for name in dict.fromkeys(method.curve for method in methods)}
        ours = [i for i, method in enumerate(methods) if not method.is_baseline]
        sampling = [i for i, method in enumerate(methods) if method.is_sampling]
        baseline = settings.only(sampling)
        areas = []

        def measure(name: str, chosen: list[int], against: str, others: frontier.Settings) -> None:
            one = settings.only(chosen)
            area = frontier.signed_area(others.points(), one.points())
            areas.append({"curve": name, "against": against, **dataclasses.asdict(area),
                          "interval": frontier.interval_of_area(others, one, resamples)})

        measure("all together", ours, frontier.SAMPLING, baseline)
        for name, chosen in curves.items():
            if not methods[chosen[0]].is_sampling:
                measure(name, chosen, frontier.SAMPLING, baseline)
        measure("all together", ours, frontier.ALL_CURVES,
                settings.only([i for i, method in enumerate(methods) if method.is_baseline]))
        written, nats, tokens = self._written(HUMAN)
        human = frontier.Settings(["human"], scores.per_prompt(written, length)["rep_3"][None], nats[None],
                                  tokens[None]).points()[0]
        fronts = {"baseline": frontier.front(baseline.points()),
                  "maturation": frontier.front(settings.only(ours).points())}
        return {
            "points": [{"curve": method.curve, "is_baseline": method.is_baseline, "is_sampling": method.is_sampling,
                        **dataclasses.asdict(point)}
                       for method, point in zip(methods, settings.points(), strict=True)],
            "areas": areas,
            "at_human": {"repetition": human.repetition, "human": human.perplexity} | {
                name: float(np.exp(frontier.log_perplexity_at(front, human.repetition))) if front else None
                for name, front in fronts.items()},
            "human": dataclasses.asdict(human),
            "note": f"A front has the settings that no other setting of its family beats. Each front is chosen on the "
                    f"prompts on which it is measured ({len(sampling)} settings of the baseline's sampling, "
                    f"{len(ours)} of maturation), and again in every resample.",
        }

    # The article's figures

    def _figures(self) -> dict[str, Any]:
        options, run = self.options, self.run
        piece = run.tokenizer.piece
        kappa = float(run.logit_scale) * (run.config.table.radius**2)
        temperatures = (1.0, 1.0 / kappa)
        room = self._figure_room
        length = min(options.max_new_tokens, 64, room // 2)
        plain = dataclasses.replace(self._writer.settings(Method("plain", "maturation")), max_new_tokens=length)
        plain = dataclasses.replace(plain, tail_length=min(plain.tail_length, room - length))
        tails = [k for k in (1, 2, 4, 8, 16, 32) if k <= room - length]
        trained = run.config.maturation.max_tail_length
        # The sample must be long enough that some tokens pass through the whole tail.
        whole = dataclasses.replace(plain, tail_length=max(k for k in tails if k <= min(trained, length // 2)))

        def record(settings: GenerationConfig, prompt: str | Sequence[int] = options.prompt, temperature: float = 1.0):
            settings = dataclasses.replace(settings, entropy_temperature=temperature)
            return run.record(prompt, settings, seed=options.seed)

        def maturing():
            soft, sharp = (record(whole, temperature=temperature) for temperature in temperatures)
            return figures.maturing(sharp, soft, piece)

        def readouts():
            before = run.rows([options.prompt], plain)[0].ids
            return {f"{scale:g}": figures.readout(
                record(dataclasses.replace(plain, guidance_scale=scale)),
                lambda ids: run.tokenizer.split(before, ids)[1], piece) for scale in _SCALES}

        def attractors():
            own = dataclasses.replace(run.config.generation, max_new_tokens=length)
            own = own.with_tail_length(min(own.tail_length, room - length))
            samples = run.generate([options.prompt], own, options.num_seeds, options.seed, options.batch_size)
            return figures.attractors([sample.tokens for sample in samples], piece)

        asked = [options.prompt, length, options.num_seeds]
        return {
            "prompt": options.prompt, "temperatures": temperatures,
            "maturing": self._part("tokens through maturation", "maturing", asked, maturing),
            "readout": self._part("the tail with and without guidance", "readout", asked, readouts),
            "lookahead": self._lookahead(),
            "diversity": self._part("K against diversity", "diversity", asked, lambda: figures.diversity_by_tail(
                run, options.prompt, plain, tails, options.num_seeds, options.seed, options.batch_size)),
            "attractors": self._part("template attractors", "attractors", asked, attractors),
            "geometry": self._part("geometry of the tables", "geometry", None, self._geometry),
        }

    def _lookahead(self) -> dict[str, Any]:
        """How many later tokens plain tails foresee, with and without guidance."""
        plain = self._writer.settings(Method("plain", "maturation"))
        plain = dataclasses.replace(plain, tail_length=min(plain.tail_length, self._room))

        def make():
            return {f"{scale:g}": figures.lookahead([
                self.run.record(ids, dataclasses.replace(plain, guidance_scale=scale), seed=self.options.seed)
                for ids in self.prompts.ids[:16]]) for scale in _SCALES}

        return self._part("what tails foresee", "lookahead", None, make)

    def _geometry(self) -> dict[str, Any]:
        found = {}
        for name, one in (("maturation", self.run), ("baseline", self.baseline)):
            before = starting_table(one)
            if before is not None:
                found[name] = figures.table_geometry(before, np.asarray(one.vocabulary.table))
        return found

    def _gap(self) -> dict[str, Any]:
        ids = np.array([[*p, *h] for p, h in zip(self.prompts.ids, self.prompts.human, strict=True)])
        k_max = self.run.config.maturation.max_tail_length
        tail_length = min(k_max, self.options.max_new_tokens // 2 - 1)
        gap = measure_gap(self.run.params, self.run.config, ids, len(self.prompts.ids[0]), tail_length,
                          self.options.seed)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in dataclasses.asdict(gap).items()}


def starting_table(generator: Generator) -> np.ndarray | None:
    """The table [V, d] that a run started with; None if its source no longer exists or has another shape."""
    config, shape = generator.config, generator.vocabulary.table.shape
    try:
        if config.init_from is not None:
            rows = Generator.from_workdir(config.init_from).params["table"]
        elif config.table.initial is not None:
            stored = open_npy(config.table.initial)
            if stored.shape != shape:
                return None
            rows = jnp.asarray(stored.astype(np.float32))
        else:
            rows = jax.jit(lambda: init_params(seed_key(config.train.seed), config, shape[0])["table"])()
    except UserError:
        return None
    return np.asarray(vocabulary_of({"table": rows}, config).table) if rows.shape == shape else None


def num_parameters(generator: Generator) -> int:
    """Number of parameters of the model."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(generator.params))


def shuffle_sentences(text: str, seed: int) -> str:
    """`text` with its sentences in random order; text without a sentence end stays with the sentence after it.

    White space stays in place, so that the text after a prompt still begins as before.
    """
    inner = text.strip()
    begin, _, end = text.partition(inner) if inner else (text, "", "")
    parts = re.split(r"((?<=[.!?])\s+)", inner)
    sentences, between = parts[::2], [*parts[1::2], end]
    order = np.random.default_rng(seed).permutation(len(sentences))
    return begin + "".join(sentences[index] + space for index, space in zip(order, between, strict=True))


def _brier_note(count: int, rows: Sequence[dict[str, Any]]) -> str:
    note = (f"Brier-n and BrierLM (CALM, arXiv:2510.27688), {_BRIER['samples']} samples at {_BRIER['contexts']} places "
            f"of each prompt's text; a deterministic decoder has a Brier-1 of 2 · accuracy − 1, and no "
            f"BrierLM if that is not positive.")
    if any(row["mauve"] is not None for row in rows):
        return note + (f" MAUVE of {count} texts, mean ± spread of five k-means seeds, from the judge's own vectors: "
                       f"with so few texts it only shows large differences.")
    why = f"fewer than {scores.FEWEST_FOR_MAUVE} texts" if scores.has_mauve() else "pip install -e '.[mauve]'"
    return f"{note} MAUVE is left out: {why}."
