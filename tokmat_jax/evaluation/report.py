"""Turns the report's data into blocks of text, tables and plots."""

import json
import math
from typing import Any

from tokmat_jax.evaluation.frontier import ALL_CURVES
from tokmat_jax.evaluation.numbers import area_interval, interval, number
from tokmat_jax.evaluation.passes import best_within
from tokmat_jax.evaluation.render import Beside, Block, Bullets, Folded, Heading, Paragraph, Plot, Quote, Table
from tokmat_jax.evaluation.scores import COLUMNS
from tokmat_jax.evaluation.verdicts import verdicts

Data = dict[str, Any]
"""The contents of `report.json`."""


def to_json(data: Data) -> str:
    """`data` as JSON; missing numbers become null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [clean(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(clean(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # Half of a surrogate pair, as in a folder name that is not UTF-8, is escaped as in JSON.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _scores(data: Data, distance: bool = False) -> Table:
    """The main table, or with `distance` the signed difference of each number from the human row."""
    human = data["rows"][0]["values"]
    rows = []
    for row in data["rows"][1 if distance else 0 :]:
        cells = []
        for column in COLUMNS:
            value = row["values"][column.key]
            cells.append(number(value["value"] - human[column.key]["value"], column.percent, signed=True) if distance
                         else interval(value, column.percent))
        rows.append([row["name"], *cells])
    return Table(["", *(column.title for column in COLUMNS)], rows)


def _without_likelihood(data: Data) -> Table:
    header = ["", "Brier-1", "Brier-2", "Brier-3", "Brier-4", "BrierLM"]
    with_mauve = any(row["mauve"] is not None for row in data["rows"])
    rows = []
    for row in data["rows"]:
        found = row["brier"]
        cells = [interval(found[f"brier_{n}"]) for n in (1, 2, 3, 4)] + [interval(found["brier_lm"])] if found else \
            ["–"] * 5
        if with_mauve:
            cells.append(f"{number(row['mauve'][0])} ± {number(row['mauve'][1])}" if row["mauve"] else "–")
        rows.append([row["name"], *cells])
    return Table(header + (["MAUVE"] if with_mauve else []), rows)


def _areas(data: Data) -> Table:
    header = ["curve", "against", "signed area, nats × Rep-3", "95 % interval", "mean gain, nats per token",
              "Rep-3 from", "to"]
    rows = [[area["curve"], area["against"], number(area["area"], signed=True),
             area_interval(area),
             number(area["mean_gain"], signed=True), number(area["low"]), number(area["high"])]
            for area in data["frontier"]["areas"]]
    return Table(header, rows)


def _passes(data: Data) -> list[Block]:
    """Gain and cost of stable commits."""
    points = data["passes"]
    if not points:
        return []
    rows = [[point["label"], number(point["tokens_per_pass"]), number(point["perplexity"]), number(point["rep_3"]),
             number(point["periodic_loop"], True)] for point in points]
    sentences = []
    for curve in dict.fromkeys(point["curve"] for point in points):
        best = best_within([point for point in points if point["curve"] == curve])
        sentences.append(f"{curve}: at most {number(best['tokens_per_pass'])} tokens a pass within 5 % of the judge "
                         f"perplexity of one token a step ({best['label'].removeprefix(curve + ': ')}).")
    table = Table(["", "tokens per pass", "judge perplexity", "Rep-3", "Loop% (periodic)"], rows)
    return [Heading("Tokens per pass"), Plot("passes"), *map(Paragraph, sentences), table, *_verified(data)]


def _verified(data: Data) -> list[Block]:
    """What verified commits gain."""
    rows = [[point["label"], str(point["batch_size"]), number(point["tokens_per_pass"]),
             " ".join(number(share, True) for share in point["accepted"]), f"{point['tokens_per_second']:,.0f}",
             f"{point['passes_per_second']:,.0f}"] for point in data["verified"]]
    header = ["", "batch", "tokens per pass", "drafts that were right, nearest first", "tokens/s", "passes/s"]
    return [Heading("Verified commits", 3), Paragraph(
        "Drafts are checked in the pass that commits the token before them, so that the text is that of the reference, "
        "immediate projection, whatever the drafts are: the nearest tokens of the slots (tail), what followed when the "
        "last tokens occurred before (lookup), or both."), Table(header, rows)]


def verdict(data: Data) -> list[str]:
    """The conclusions from the numbers, in sentences."""
    said = []
    for area in data["frontier"]["areas"][:1]:
        low, high = area["interval"]
        if area["area"] is None or not math.isfinite(area["area"]):
            said.append("The two fronts have no common range of repetition, so there is no area between them.")
            continue
        sure = low > 0 or high < 0
        ahead = "maturation is ahead of" if area["area"] > 0 else "maturation is behind"
        said.append(
            f"The signed area between the two fronts is {number(area['area'], signed=True)} nats × Rep-3 (95 % "
            f"interval {number(low, signed=True)} to {number(high, signed=True)}): {ahead} the baseline's sampling"
            + ("." if sure else ", but chance over prompts can explain it."))
    said += [f"Against {area['against']} together it is "
             f"{number(area['area'], signed=True)} ({area_interval(area)})." for area in data["frontier"]["areas"]
             if area["against"] == ALL_CURVES and number(area["area"]) != "–"]
    at = data["frontier"]["at_human"]
    if at["baseline"] is not None or at["maturation"] is not None:
        said.append(f"At the human text's repetition (Rep-3 {number(at['repetition'])}), interpolated between "
                    f"settings, the judge gives the baseline's sampling {number(at['baseline'])}, maturation "
                    f"{number(at['maturation'])} and the human text "
                    f"{number(at['human'])}.")
    rows = {row["name"]: row["values"] for row in data["rows"]}
    loops = [f"{name} {number(values['periodic_loop']['value'], True)}" for name, values in rows.items()
             if name in ("human", "greedy") or name.startswith("maturation")]
    return [*said, f"Periodic loops: {'; '.join(loops)}."]


def _judge_sentences(data: Data) -> str:
    """Names the judge, whom it favours, and its perplexity of the human text, in order and with sentences shuffled."""
    judge, calibration = data["judge"], data["calibration"]
    bias = " It is the baseline itself, so it favours the baseline's text." if judge["is_baseline"] else ""
    return (f"Judge: {judge['name']}, {judge['num_parameters']:,} parameters, perplexity per token of its own.{bias} "
            f"Calibration: human text {number(calibration['human'])}, the same with its sentences shuffled "
            f"{number(calibration['shuffled'])}.")


def _facts(data: Data) -> list[str]:
    """The models, the prompts and the judge."""
    prompts, lines = data["prompts"], []
    lines.append(f"{data['run']['name']} (step {data['run']['step']:,}, {data['run']['num_parameters']:,} parameters) "
                 f"against {data['baseline']['name']} (step {data['baseline']['step']:,}, "
                 f"{data['baseline']['num_parameters']:,} parameters).")
    lines.append(f"{prompts['count']} held-out prompts of {prompts['prompt_tokens']} tokens, L = "
                 f"{prompts['new_tokens']} new tokens, seed {data['seed']}. Intervals: 95 %, bootstrap over prompts. "
                 f"Entropy at τ = {data['temperature']:g}.")
    lines += [f"Note: {note}." for note in prompts["notes"]]
    short = [f"{row['name']}: {row['full']}" for row in data["rows"] if row["full"] < prompts["count"]]
    if data["forbids_end"]:
        lines.append(f"No method could end a sample before {prompts['new_tokens']} tokens.")
    if short:
        lines.append(f"Repetition and loops count samples of exactly L tokens, so each method has a set of its own; of "
                     f"{prompts['count']} these had fewer. {'; '.join(short)}. --forbid-end-of-text compares all "
                     f"prompts.")
    lines.append(_judge_sentences(data))
    return lines


def _settings(row: Data) -> str:
    """The settings of a method in words."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in row["settings"].items())


def _gap_sentence(gap: Data) -> str:
    """The train–inference gap in one sentence."""
    front = gap["real_loss"][0] - gap["simulated_loss"][0]
    mean = sum(gap["real_loss"]) / len(gap["real_loss"]) - sum(gap["simulated_loss"]) / len(gap["simulated_loss"])
    return (f"On real tails the loss is {number(mean, signed=True)} nats above that on simulated ones, mean over "
            f"{len(gap['maturity'])} slots ({number(front, signed=True)} at the front); top-1 at the front is "
            f"{number(gap['real_top1'][0])} against {number(gap['simulated_top1'][0])}.")


def _geometry(data: Data) -> Table:
    names = ("mean_cosine", "partition_ratio", "effective_dimensions", "skewness", "largest_hub", "antihubs")
    titles = ("mean cosine", "partition ratio", "effective dimensions", "hubness (skewness of N₁₀)", "largest hub / 10",
              "antihubs")
    rows = []
    for run, found in data["figures"]["geometry"].items():
        rows += [[f"{run}, {when}", *(number(found[when][name]) for name in names)] for when in ("before", "after")]
    return Table(["table", *titles], rows)


def _geometry_sentences(data: Data) -> list[str]:
    """How far training moved each table."""
    return [f"{run}: rows turned by {number(found['drift_degrees']['mean'])}° on average "
            f"({number(found['drift_degrees']['p10'])}° to {number(found['drift_degrees']['p90'])}° for the middle "
            f"80 %); {number(found['nearest_changed'], True)} of the tokens have another nearest neighbour."
            for run, found in data["figures"]["geometry"].items()]


def _lookahead_sentence(figures: Data) -> str:
    """How often tails foresee tokens, with and without guidance."""
    parts = [f"s = {scale}: {number(found['share'], True)} (chance {number(found['chance'], True)})"
             for scale, found in figures["lookahead"].items()]
    return "Tail tokens that are committed within the next 32: " + ", ".join(parts) + "."


def _entropy_sentence(data: Data) -> str:
    found = data["figures"]["maturing"]
    if not found["entropy"]["mean"]:
        return "No sample was long enough for a token to go through the whole tail."
    paper, sharp = found["entropy"]["mean"], found["sharp_entropy"]["mean"]
    taus = data["figures"]["temperatures"]
    return (f"Entropy from birth to commit, mean of {found['num_tokens']} tokens with K = {found['tail_length']}: "
            f"{number(paper[0])} → {number(paper[-1])} nats at τ = {taus[0]:g} (log V = "
            f"{number(data['log_vocabulary'])}), {number(sharp[0])} → {number(sharp[-1])} at τ = {taus[1]:.3g} = 1/κ. "
            f"The nearest token changes {number(found['mean_changes'])} times on the way.")


def _attractor_sentence(found: Data) -> str:
    return (f"{found['num_samples']} samples of one prompt, aligned; tokens that at least half of them share are "
            f"marked. {number(found['stability'], True)} of all tokens are, {number(found['chance'], True)} if the "
            f"tokens of each sample are shuffled.")


def document(data: Data) -> list[Block]:
    """The whole report. If the pair is mismatched, its first line says so."""
    figures = data["figures"]
    blocks: list[Block] = []
    if data["mismatch"]:
        blocks.append(Paragraph(f"MISMATCH: this pair does not compare like with like: {'; '.join(data['mismatch'])}.",
                                is_warning=True))
    blocks += [Heading(data["title"], 1), _answers(data), *map(Paragraph, _facts(data))]
    blocks += [Heading("Three prompts"), *_three_prompts(data["rows"]),
               Folded("all methods", [_samples(row) for row in data["rows"]])]
    blocks += [Heading("The frontier"), *map(Paragraph, verdict(data)), Plot("frontier"), _areas(data),
               Paragraph(data["frontier"]["note"]), Folded("all curves", [Plot("frontier_all")])]
    blocks += _passes(data)
    blocks += [Heading("Scores"), _scores(data), Heading("Distance to the human row"), _scores(data, distance=True),
               Paragraph("More distinct than human is not better: 0 is the aim of every column but the perplexity of a "
                         "judge.")]
    blocks += [Heading("Without a likelihood"), _without_likelihood(data), Paragraph(data["brier_note"])]
    blocks += [Heading("Through maturation"), Plot("entropy"), Paragraph(_entropy_sentence(data)),
               *(Plot(f"candidates_{index}") for index in range(len(figures["maturing"]["tokens"][:3])))]
    blocks += [Heading("The tail, with and without guidance")]
    for scale, moments in figures["readout"].items():
        blocks += [Heading(f"s = {scale}", 3), *(_moment(moment, figures["prompt"]) for moment in moments)]
    blocks += [Paragraph(_lookahead_sentence(figures)), Heading("K against diversity"), Plot("diversity")]
    blocks += [Heading("Template attractors"), Paragraph(_attractor_sentence(figures["attractors"])), *(
        Quote([(piece, "mark" if stays else "new") for piece, stays in row]) for row in figures["attractors"]["rows"])]
    blocks += [Heading("The table"), _geometry(data), *map(Paragraph, _geometry_sentences(data))]
    blocks += [Heading("Train–inference gap"), Plot("gap"), Paragraph(_gap_sentence(data["gap"]))]
    blocks += [Heading("Definitions"), Bullets([f"{column.title}: {column.meaning}." for column in COLUMNS])]
    return [*blocks, Heading("Made with"), Paragraph(data["command"]), Paragraph(f"{data['seconds']:.0f} s")]


def _answers(data: Data) -> Table:
    """The five questions of `verdicts`."""
    return Table(["question", "answer", "figure", "95 % interval"], [
        [one.question, one.answer, one.figure, one.interval] for one in verdicts(data)], in_words=True)


def _three_prompts(rows: list[Data]) -> list[Block]:
    """What follows each prompt: the human text, and that of three methods."""
    ours = next((row["name"] for row in rows if row["kind"] == "maturation"), None)
    chosen = [row for row in rows if row["name"] in ("human", "greedy", "nucleus 0.95", ours)]
    found: list[Block] = []
    for index, (prompt, _) in enumerate(rows[0]["samples"]):
        found += [Quote([(prompt, "prompt")]), Beside(
            [row["name"] for row in chosen], [Quote([(row["samples"][index][1], "new")]) for row in chosen])]
    return found


def _samples(row: Data) -> Folded:
    quotes = [Quote([(prompt, "prompt"), (text, "new")]) for prompt, text in row["samples"]]
    return Folded(f"{row['name']} ({_settings(row)})" if row["settings"] else row["name"], quotes)


def _moment(moment: Data, prompt: str) -> Quote:
    return Quote([(prompt, "prompt"), (moment["text"], "new"), ("│" + "│".join(moment["tail"]) + "│", "tail")])
