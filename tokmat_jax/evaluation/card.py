"""The report card as data: every method continues the same prompts, and its text is judged and measured."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tokmat_jax.config import GenerationConfig
from tokmat_jax.evaluation import figures, frontier, metrics, scores
from tokmat_jax.evaluation.article import Article
from tokmat_jax.evaluation.gap import measure_gap
from tokmat_jax.evaluation.judge import Judge, perplexity
from tokmat_jax.evaluation.measurement import Options
from tokmat_jax.evaluation.methods import (
    HUMAN,
    PLAIN_MATURATION,
    Method,
    Writer,
    Written,
    curve_methods,
    stable_methods,
    table_methods,
)
from tokmat_jax.evaluation.pair import Prompts
from tokmat_jax.evaluation.passes import DRAFTS, timed, verified_cases
from tokmat_jax.evaluation.quality import share_right
from tokmat_jax.evaluation.store import Store
from tokmat_jax.generation.generator import Generator

_BRIER = {"contexts": 4, "ahead": 4, "samples": 4}
"""Contexts per prompt, tokens generated after each context, and independent samples of them."""
_BATCHES = (1, 8)
"""Rows that write together if speed is measured."""
_SHORT_ROWS = ("human", "greedy", "nucleus 0.95", "plain, guidance 2", "plain, repulsion 0.4")
_SHORT_CURVES = ("temperature", "nucleus", "penalty", "repulsion of the baseline", "repulsion", "guidance",
                 "σ 1, K 1, by α_max")


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
        self._writer = Writer(run, baseline, options)
        self._reader = Judge(baseline)
        self._room = run.config.max_positions - len(prompts.ids[0]) - options.max_new_tokens
        self._article = Article(run, baseline, options, self._writer.settings(PLAIN_MATURATION), self._part)
        self.table = table_methods(run.config.generation, self._room)
        self.curves = curve_methods(self._room)
        self.stable = stable_methods() if self._room >= GenerationConfig().tail_length else []

    def num_parts(self) -> int:
        """How many parts there are."""
        return 2 * len(self.table) + len(self.curves) + len(self.stable) + len(self._verified_cases()) + (
            len(DRAFTS) if self.stable else 0) + 10

    def data(self, told: Callable[[int, str], None]) -> dict[str, Any]:
        """All parts of the report. Parts that an earlier, interrupted evaluation finished are read from the store.

        `told` is called after each part with the number of finished parts and the name of the latest.
        """
        self._done, self._told = 0, told
        rows = [self._row(method) for method in self.table]
        figure = self._article.data()
        return {
            "rows": rows, "top1": self._top1(), "drafts": self._drafts(),
            "calibration": self._part("calibration", "calibration", None, self._calibration),
            "frontier": self._frontier(self.curves), "passes": self._passes(),
            "verified": self._verified(), "figures": figure | {"lookahead": self._lookahead()},
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

    # The language model

    def _top1(self) -> dict[str, Any] | None:
        """Top-1 on the human text of both models, and its difference; None if their tokenizers differ."""
        if not self._same(self.baseline):
            self._part("top-1", "top1", "the tokenizers differ", lambda: None)
            return None
        found = self._part("top-1", "top1", None, lambda: {
            name: share_right(one, self.prompts).tolist()
            for name, one in (("run", self.run), ("baseline", self.baseline))})
        run, baseline = (np.array(found[name]) for name in ("run", "baseline"))
        lead = scores.Value(float(np.mean(run - baseline)), *metrics.bootstrap_mean(
            run - baseline, self.options.resamples))
        return {"run": float(run.mean()), "baseline": float(baseline.mean()), "lead": dataclasses.asdict(lead)}

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

    def _drafts(self) -> dict[str, Any]:
        """Tokens a pass of verified commits over all prompts, for each source of drafts."""
        found = {}
        for draft in DRAFTS if self.stable else ():
            settings = dataclasses.replace(self._writer.settings(PLAIN_MATURATION), commit="verified", draft=draft)

            def make(settings: GenerationConfig = settings) -> dict[str, list[int]]:
                samples = self.run.generate(self.prompts.ids, settings, batch_size=self.options.batch_size)
                return {"tokens": [len(one.tokens) for one in samples], "passes": [one.passes for one in samples]}

            made = self._part(f"drafts: {draft}", "drafts", draft, make)
            tokens, passes = np.array(made["tokens"]), np.array(made["passes"])
            found[draft] = dataclasses.asdict(scores.value(
                lambda chosen, tokens=tokens, passes=passes: float(tokens[chosen].sum() / passes[chosen].sum()),
                len(tokens), self.options.resamples))
        return found

    def _verified_cases(self) -> list[tuple[str, int, GenerationConfig]]:
        """(name, batch size, settings) of what verified commits are measured in."""
        if not self.stable:  # there is no room for a tail
            return []
        base = self._writer.settings(PLAIN_MATURATION)
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

    def _lookahead(self) -> dict[str, Any]:
        """How many later tokens plain tails foresee, with and without guidance."""
        plain = self._writer.settings(PLAIN_MATURATION)
        plain = dataclasses.replace(plain, tail_length=min(plain.tail_length, self._room))

        def make():
            return {f"{scale:g}": figures.lookahead([
                self.run.record(ids, dataclasses.replace(plain, guidance_scale=scale), seed=self.options.seed)
                for ids in self.prompts.ids[:16]]) for scale in figures.SCALES}

        return self._part("what tails foresee", "lookahead", None, make)

    def _gap(self) -> dict[str, Any]:
        ids = np.array([[*p, *h] for p, h in zip(self.prompts.ids, self.prompts.human, strict=True)])
        k_max = self.run.config.maturation.max_tail_length
        tail_length = min(k_max, self.options.max_new_tokens // 2 - 1)
        gap = measure_gap(self.run.params, self.run.config, ids, len(self.prompts.ids[0]), tail_length,
                          self.options.seed)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in dataclasses.asdict(gap).items()}


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
