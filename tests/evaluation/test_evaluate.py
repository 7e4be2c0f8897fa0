"""The report card as a user runs it, on tiny runs."""

import dataclasses
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

import runs
from tokmat_jax.commands import evaluate
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.measurement import Options
from tokmat_jax.evaluation.methods import PLAIN
from tokmat_jax.evaluation.pair import Prompts
from tokmat_jax.generation.generator import Generator

pytest.importorskip("matplotlib", reason="the report's plots need matplotlib: pip install -e '.[report]'")

SMALL = {"num-prompts": 5, "prompt-tokens": 8, "max-new-tokens": 12, "num-seeds": 4, "resamples": 40, "batch-size": 16,
         "prompt": "the cat"}


def arguments(runs_dir, output, *more, **changed):
    flags = {"workdir": runs_dir / "run", "baseline": runs_dir / "ar", "output": output} | SMALL | changed
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.fixture(scope="module", autouse=True)
def one_batch_size():
    """Verified commits are compiled for one size of batches only: most of what a report takes here is compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokmat_jax.evaluation.card._BATCHES", (1,))
        yield


@pytest.fixture(scope="module")
def reported(runs_dir, tmp_path_factory):
    """The folder of a report on the pair `run` and `ar`."""
    output = tmp_path_factory.mktemp("report")
    with jax.numpy_dtype_promotion("standard"):
        evaluate.main(arguments(runs_dir, output))
    return output


def read(output):
    return json.loads((output / "report.json").read_text())


def test_a_report_has_all_its_rows_columns_and_files(reported):
    data = read(reported)
    assert [row["name"] for row in data["rows"]] == [
        "human", "greedy", "greedy, penalty 1.2", "temperature 1", "nucleus 0.95", "contrastive search", "best of 16",
        "greedy, repulsion 0.4", "maturation, the run's setting", "maturation, plain (K 8)", "plain, guidance 2",
        "plain, repulsion 0.4", "plain, K 1", "plain, K 4", "plain, K 16"]  # 48 positions hold no tail of 64
    right = data["top1"]
    assert right["lead"]["value"] == pytest.approx(right["run"] - right["baseline"])
    assert set(data["drafts"]) == {"tail", "lookup", "both"}
    assert all(1.0 <= one["low"] <= one["value"] <= one["high"] for one in data["drafts"].values())
    assert data["prompts"] == {"count": 5, "prompt_tokens": 8, "new_tokens": 12, "notes": []}
    for row in data["rows"]:
        values = row["values"]
        assert values["judge_perplexity"]["value"] > 1
        if row["full"]:
            assert values["dist_1"]["low"] <= values["dist_1"]["value"] <= values["dist_1"]["high"]
            assert values["rep_3"]["value"] + values["dist_3"]["value"] == pytest.approx(1.0)
        assert (row["brier"] is None) == (row["name"] == "human")
    assert data["judge"]["is_baseline"]
    assert set(data["calibration"]) == {"human", "shuffled"}
    curves = {point["curve"] for point in data["frontier"]["points"]}
    assert {"temperature", "nucleus", "guidance", "tail noise", "history noise", "rate", "repulsion", "penalty",
            "repulsion of the baseline"} <= curves
    areas = [(area["curve"], area["against"]) for area in data["frontier"]["areas"]]
    assert areas[0] == ("all together", "the baseline's sampling")
    assert areas[-1] == ("all together", "the baseline's sampling, penalty and repulsion")
    assert {curve for curve, _ in areas[1:-1]} == curves - {"temperature", "nucleus"}
    drawn = {path.stem for path in (reported / "plots").glob("*.svg")}
    assert {"frontier", "frontier_all", "entropy", "diversity", "gap", "candidates_0"} <= drawn
    markdown, page = (reported / "report.md").read_text(), (reported / "report.html").read_text()
    assert list(map(markdown.index, IN_ORDER)) == sorted(map(markdown.index, IN_ORDER))
    for words in ("it favours the baseline's text", "Distance to the human row", "Template attractors",
                  "Train–inference gap", "Definitions"):
        assert words in markdown
        assert words in page.replace("&#x27;", "'")
    for name in drawn:
        assert f"plots/{name}.svg" in markdown
    assert page.count("<figure") == len(drawn)


IN_ORDER = ("Is it as good a language model?", "Is it ahead of sampling?", "decoded alike?", "Is it free of loops?",
            "several tokens a pass?", "Judge: ", "Three prompts", "The frontier", "Scores", "Definitions")
"""What a reader wants first comes first."""


HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)> & \"'` \u2028\u202e\x1b\udcff"


def hostile(value):
    """`value` with something in every text of it that a page or a file could not take as it is."""
    if isinstance(value, dict):
        return {name: hostile(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_no_text_in_a_report_does_anything(reported, tmp_path):
    data = read(reported)
    for row in data["rows"]:  # what is infinite is null in the file
        row["values"] = {key: {name: float("nan") if one is None else one for name, one in value.items()}
                         for key, value in row["values"].items()}
    for name in ("title", "run", "baseline", "prompts", "judge", "mismatch", "brier_note", "command", "rows"):
        data[name] = hostile(data[name])
    figures = data["figures"]
    for name in ("maturing", "readout", "attractors", "prompt"):
        figures[name] = hostile(figures[name])
    figures["geometry"] = {name + HOSTILE: found for name, found in figures["geometry"].items()}
    data["mismatch"] = [HOSTILE]
    evaluate.write(data, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;img src=x onerror=alert(2)&gt;") > 50
    for tag in ("<script", "<img", "</script"):
        assert tag not in page
    assert page.count("</style>") == 1 + page.count("<style type")
    assert not re.search("[\u202e\x1b]", page + (tmp_path / "report.md").read_text(encoding="utf-8"))
    assert read(tmp_path)["title"].endswith(HOSTILE)


def test_the_human_row_is_the_text_behind_the_prompts(reported, runs_dir):
    human = read(reported)["rows"][0]
    corpus = (runs_dir / "corpus.txt").read_text()
    for prompt, text in human["samples"]:
        assert prompt + text in corpus


def test_an_interrupted_report_goes_on_and_is_the_same(reported, runs_dir, tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(sorted((reported / "parts").iterdir())):
        if number % 9:
            shutil.copy(part, tmp_path / "parts")
    with jax.numpy_dtype_promotion("standard"):
        evaluate.main(arguments(runs_dir, tmp_path))
    assert "parts were there already" in capsys.readouterr().out
    one, two = read(reported), read(tmp_path)
    for data in (one, two):
        del data["seconds"], data["command"]
        for point in data["verified"]:  # what a clock says
            del point["tokens_per_second"], point["passes_per_second"]
    assert one == two


def test_another_seed_length_prompt_or_checkpoint_takes_nothing_from_an_earlier_report(runs_dir, tmp_path):
    models = [Generator.from_workdir(runs_dir / name) for name in ("run", "ar")]
    states = {"run": (6, 1), "baseline": (6, 1)}
    prompts, options = Prompts([[1, 2]], [[3, 4]], ()), Options(128, 0, 10, 8, "", 2)
    origins = [
        evaluate.origin(states, models, prompts, options),
        *(evaluate.origin(states, models, prompts, dataclasses.replace(options, **changed))
          for changed in ({"seed": 1}, {"max_new_tokens": 64}, {"forbid_end_of_text": True})),
        evaluate.origin(states | {"run": (6, 2)}, models, prompts, options),
        evaluate.origin(states, models[::-1], prompts, options),
        evaluate.origin(states, models, dataclasses.replace(prompts, human=[[3, 5]]), options),
    ]
    for number, made_from in enumerate(origins):
        assert evaluate.Store(tmp_path, made_from).get("x", None, lambda number=number: number) == number
    for number, made_from in enumerate(origins):
        assert evaluate.Store(tmp_path, made_from).get("x", None, lambda: None) == number


def test_a_pair_that_does_not_match_is_refused(runs_dir, tmp_path):
    other = runs.run(runs_dir, "short_ar", "--objective.kind", "ar", "--train.num-steps", "3")
    with pytest.raises(UserError, match=r"short_ar is not a fair baseline of .*num_steps is 6.*--allow-mismatch"):
        evaluate.main(arguments(runs_dir, tmp_path / "no", baseline=other))
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_mismatch_that_is_allowed_stands_in_the_first_line(runs_dir, tmp_path):
    other = runs.run(runs_dir, "other_ar", "--objective.kind", "ar", "--train.num-steps", "3", "--tokenizer.kind",
                     "bytes")
    changed = {"baseline": other, "num-prompts": 2, "resamples": 5, "num-seeds": 2}
    with jax.numpy_dtype_promotion("standard"):
        evaluate.main(arguments(runs_dir, tmp_path / "yes", "--allow-mismatch", **changed))
    first = (tmp_path / "yes" / "report.md").read_text().splitlines()[0]
    assert first.startswith("**MISMATCH")
    assert "the tokenizers differ" in first
    assert "train.num_steps is 6, the baseline has 3" in first
    assert "<p class=warning>MISMATCH" in (tmp_path / "yes" / "report.html").read_text()


@pytest.mark.slow
def test_where_positions_are_scarce_long_tails_are_left_out(runs_dir, tmp_path):
    changed = {"prompt-tokens": 33, "num-prompts": 2, "resamples": 5, "num-seeds": 2}
    with jax.numpy_dtype_promotion("standard"):
        evaluate.main(arguments(runs_dir, tmp_path, "--forbid-end-of-text", **changed))
    data = read(tmp_path)
    assert [row["name"] for row in data["rows"] if row["kind"] == "maturation"] == ["plain, K 1"]
    assert "No method could end a sample before 12 tokens." in (tmp_path / "report.md").read_text()
    assert all(row["full"] == 2 and row["values"]["ended"]["value"] == 0 for row in data["rows"])
    assert "Periodic loops: human" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("changed", "says"), [
    ({"num-prompts": 1}, "--num-prompts must be at least 2, found 1"),
    ({"max-new-tokens": 47}, "--max-new-tokens 47 leaves no room for a prompt: the model has 48 positions"),
    ({"prompt-tokens": 30, "max-new-tokens": 300}, "leaves no room for a prompt"),
    ({"seed": -1}, "--seed must lie in 0..2³²−1"),
    ({"workdir": "/nowhere"}, "/nowhere is not a run directory"),
    ({"prompt": "\u20ac" * 14}, "--prompt has 42 tokens, which leaves 6 of the model's 48 positions"),
    ({"judge": "/nowhere/judge"}, "SOURCE '/nowhere/judge' does not exist"),
])
def test_a_mistake_is_one_line(runs_dir, tmp_path, changed, says):
    with pytest.raises(UserError) as caught:
        evaluate.main(arguments(runs_dir, tmp_path / "report", **changed))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_roles_cannot_be_exchanged(runs_dir, tmp_path):
    for changed, says in (({"workdir": runs_dir / "ar"}, "is an autoregressive baseline, not a maturation run"),
                          ({"baseline": runs_dir / "run"}, "is a maturation run; train one with --objective.kind ar"),
                          ({"judge": runs_dir / "run"}, "cannot judge: it is a maturation run")):
        with pytest.raises(UserError, match=says):
            evaluate.main(arguments(runs_dir, tmp_path, **changed))


def test_fewer_and_shorter_prompts_than_asked_for_are_said_with_the_count(reported, runs_dir, tmp_path):
    from tokmat_jax.data.corpus import prepare
    from tokmat_jax.evaluation.pair import prompts_of
    from tokmat_jax.storage.workdir import load_config

    config = load_config(runs_dir / "run")
    found = prompts_of(prepare(config), config, 1000, 40, 20)
    assert len(found.ids[0]) == 27
    assert found.notes == ("prompts of 40 tokens were asked for, the model's positions leave 27",
                           f"1000 prompts were asked for, the held-out text has {len(found.ids)}")


def test_plain_is_the_plain_algorithm():
    assert (PLAIN["guidance_scale"], PLAIN["rate"], PLAIN["history_noise"]) == (1.0, None, 0.0)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
def test_the_page_opens_in_a_browser_without_a_complaint_and_without_a_network(reported, tmp_path):
    # Its own policy forbids the page to fetch anything: an attempt would be a complaint on the console.
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in (
        reported / "report.html").read_text()
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--v=0", "--window-size=400,800", "--dump-dom",
         (reported / "report.html").resolve().as_uri()],
        capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    assert shown.stdout.count("<svg") == len(list((reported / "plots").glob("*.svg")))


def test_the_report_is_strict_json(reported):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads((reported / "report.json").read_text(), parse_constant=refuse)
    assert np.isfinite(read(reported)["log_vocabulary"])
