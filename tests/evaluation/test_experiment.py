"""Named experiments: what a file may say, what is trained for one, its row, and that nothing is done twice."""

import dataclasses
import json

import jax
import pytest

import runs
from tokmat_jax.commands import experiment, train
from tokmat_jax.errors import UserError
from tokmat_jax.storage.workdir import save_config

pytest.importorskip("matplotlib", reason="the summary's plot needs matplotlib: pip install -e '.[report]'")

WORDS = 'hypothesis = "it helps"\nprediction = "a little"\n'
FILE = f"""base = "{{base}}"
[experiments.plain]
{WORDS}
[experiments.noisy]
{WORDS}flags = ["--maturation.tail-noise", "1.0"]
[experiments.staged]
{WORDS}first = ["--objective.kind", "ar", "--train.num-steps", "2"]
flags = ["--train.num-steps", "4"]
[experiments.greedy_with_tokens]
{WORDS}flags = ["--train.num-steps", "7"]
[experiments.wider]
{WORDS}flags = ["--model.num-heads", "4"]
[experiments.wider_both]
{WORDS}shared = ["--model.num-heads", "4"]
"""
SMALL = ["--num-prompts", "4", "--prompt-tokens", "8", "--max-new-tokens", "8", "--batch-size", "16", "--resamples",
         "20"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, a base config and a file of experiments."""
    folder = tmp_path_factory.mktemp("experiments")
    runs.write_corpus(folder)
    flags = runs.arguments(folder, "unused", "--train.num-samples", "0")
    (folder / "base.py").write_text(f"from tokmat_jax.commands.flags import parse_config\n\n"
                                    f"def get_config():\n    return parse_config({flags!r})\n")
    (folder / "all.toml").write_text(FILE.format(base=folder / "base.py"))
    return folder


def go(place, monkeypatch, *words):
    """Runs the command; returns the workdirs that were trained."""
    trained = []

    def in_process(command):
        trained.append(command[command.index("--workdir") + 1])
        assert command[1:4] == ["-m", "tokmat_jax", "train"]
        train.main(command[4:])
        return 0

    monkeypatch.setattr(experiment, "run_command", in_process)
    with jax.numpy_dtype_promotion("standard"):
        experiment.main([*words, "--file", str(place / "all.toml"), "--folder", str(place / "runs"), "--log",
                         str(place / "log.jsonl"), *SMALL])
    return [one.removeprefix(f"{place}/runs/") for one in trained]


def test_an_experiment_trains_its_pair_and_its_judge_measures_and_logs(place, monkeypatch, capsys):
    assert go(place, monkeypatch, "plain") == ["plain/seed-0", "ar/seed-0", "ar/seed-1"]
    said = capsys.readouterr().out
    for words in ("plain, seed 0", "top-1", "periodic loops", "signed area against the baseline's sampling",
                  "signed area against the baseline's sampling, penalty and repulsion",
                  "tail tokens committed within the next 32"):
        assert words in said
    [row] = experiment.read_log(place / "log.jsonl")
    assert (row["experiment"], row["seed"], row["judge"]) == ("plain", 0, "the baseline of seed 1")
    assert row["tokens"] == 6 * 4 * 48
    assert row["hypothesis"] == "it helps"
    last = json.loads((place / "runs/plain/seed-0/metrics.jsonl").read_text().splitlines()[-1])
    assert row["top1"]["run"] == last["validation/top1/maturity_1"]
    assert {"human", "greedy", "nucleus 0.95", "maturation, plain (K 8)", "plain, repulsion 0.4"} <= set(row["rows"])
    curves = {point["curve"] for point in row["frontier"]["points"]}
    assert {"temperature", "nucleus", "repulsion", "repulsion of the baseline"} <= curves
    assert "| plain | 0 |" in (place / "runs/summary.md").read_text()
    assert "<svg" in (place / "runs/frontier.svg").read_text()

    # Again: nothing is trained, what was written and judged is taken from its parts, and the row is the same.
    monkeypatch.setattr(experiment.Card, "_judge_tokens", lambda *_: pytest.fail("judged again"))
    assert go(place, monkeypatch, "plain") == []
    lines = (place / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert experiment.read_log(place / "log.jsonl") == [json.loads(lines[0])]

    # A text that has changed since is not measured on.
    text = (place / "corpus.txt").read_text()
    (place / "corpus.txt").write_text(text + "<|endoftext|>more of it")
    with pytest.raises(UserError, match="seed-0 was trained on a different version of this corpus"):
        go(place, monkeypatch, "plain")
    (place / "corpus.txt").write_text(text)


def test_another_experiment_shares_the_baseline_and_what_it_wrote(place, monkeypatch):
    go(place, monkeypatch, "plain")
    before = {path.name for path in (place / "runs/parts/ar").iterdir()}
    assert go(place, monkeypatch, "noisy") == ["noisy/seed-0"]
    assert {path.name for path in (place / "runs/parts/ar").iterdir()} == before
    rows = {row["experiment"]: row for row in experiment.read_log(place / "log.jsonl")}
    assert rows["noisy"]["flags"] == ["--maturation.tail-noise", "1.0"]
    assert rows["noisy"]["rows"]["greedy"] == rows["plain"]["rows"]["greedy"]


def test_stages_count_together_and_the_second_starts_from_the_first(place, monkeypatch):
    go(place, monkeypatch, "plain")
    assert go(place, monkeypatch, "staged") == ["staged/seed-0-first", "staged/seed-0"]
    rows = {row["experiment"]: row for row in experiment.read_log(place / "log.jsonl")}
    assert rows["staged"]["tokens"] == rows["plain"]["tokens"]
    config = json.loads((place / "runs/staged/seed-0/config.json").read_text())
    assert config["init_from"] == str(place / "runs/staged/seed-0-first")
    longer = dataclasses.replace(experiment.read_experiments(place / "all.toml")["staged"],
                                 flags=("--train.num-steps", "5"))
    with pytest.raises(UserError, match=r"staged reads 1,344 tokens in all its stages, its baseline 1,152: give both"):
        experiment.train(longer, place / "runs", 0, experiment.Args(prompt_tokens=8, max_new_tokens=8))


@pytest.mark.parametrize(("name", "says"), [
    ("greedy_with_tokens", r"greedy_with_tokens is not a fair comparison: train.num_steps is 7, the baseline has 6"),
    ("wider", r"wider is not a fair comparison: model.num_heads is 4, the baseline has 2; .* 'shared'"),
    ("nothing", r"has no experiment 'nothing'; it has plain, noisy"),
])
def test_an_unfair_or_unknown_experiment_is_refused(place, monkeypatch, name, says):
    (place / "log.jsonl").touch()
    before = (place / "log.jsonl").read_text()
    monkeypatch.setattr(experiment.Stage, "train", lambda stage: pytest.fail(f"{stage.workdir} is trained"))
    with pytest.raises(UserError, match=says):
        go(place, monkeypatch, name)
    assert (place / "log.jsonl").read_text() == before


def test_what_both_change_makes_a_baseline_of_its_own(place):
    known = experiment.read_experiments(place / "all.toml")
    folder = place / "runs"
    own = experiment.baseline_stage(known["wider_both"], folder, 2)
    assert own.workdir == folder / "wider_both_ar/seed-2"
    assert own.config.model.num_heads == 4
    assert own.config.train.seed == 2
    assert experiment.baseline_stage(known["noisy"], folder, 2).workdir == folder / "ar/seed-2"


def test_a_training_that_fails_is_one_line(place, monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "run_command", lambda _: 2)
    with pytest.raises(UserError, match=r"training .*noisy/seed-5 failed, see above"):
        experiment.main(["noisy", "--seeds", "5", "--file", str(place / "all.toml"), "--folder", str(tmp_path),
                         "--log", str(tmp_path / "log.jsonl"), *SMALL])


def test_without_a_name_the_experiments_are_listed(place, capsys):
    experiment.main(["--file", str(place / "all.toml")])
    said = capsys.readouterr().out
    assert "noisy: it helps" in said
    assert "--maturation.tail-noise 1.0" in said


@pytest.mark.parametrize(("text", "says"), [
    ("base = ", "is not TOML"),
    ("base = 'x'", r"must hold a text 'base' and tables"),
    ("base = 'x'\n[experiments.a]\nhypothesis = 'h'", "experiments.a has no prediction"),
    (f"base = 'x'\n[experiments.a]\n{WORDS}flags = '--x'", r"experiments.a: flags = '--x' is not one of"),
    (f"base = 'x'\n[experiments.a]\n{WORDS}flag = ['--x']", r"flag = \['--x'\] is not one of"),
    (f"base = 'x'\n[experiments.ar]\n{WORDS}", "'ar' is reserved for the baseline"),
    (f"base = 'x'\n[experiments.'../a']\n{WORDS}", "letters, digits and underscores"),
    ("base = 'x'\nexperiments.a = 3", "experiments.a must be a table"),
    (f"base = 'x'\n[experiments.b_ar]\n{WORDS}", "'ar' is reserved for the baseline"),
    (f"base = 'x'\n[experiments.a]\n{WORDS}flags = ['--train.seed', '3']", "flags must leave --train.seed to the"),
    (f"base = 'x'\n[experiments.a]\n{WORDS}flags = ['--objective.kind=ar']", "must leave --objective.kind=ar to the"),
    (f"base = 'x'\n[experiments.a]\n{WORDS}first = ['--init-from', 'x']", "first must leave --init-from to the"),
])
def test_a_file_that_says_something_else_is_one_line(tmp_path, text, says):
    (tmp_path / "all.toml").write_text(text)
    with pytest.raises(UserError, match=says):
        experiment.read_experiments(tmp_path / "all.toml")


@pytest.mark.parametrize(("flag", "says"), [
    (("--num-prompts", "0"), "--num-prompts must be at least 2, found 0"),
    (("--seeds", "-1"), r"--seeds must be one or several numbers from 0 on, found \[-1\]"),
    (("--max-new-tokens", "40"), "a plain tail need 56 positions, the model has 48"),
])
def test_a_number_out_of_range_is_one_line(place, monkeypatch, tmp_path, flag, says):
    monkeypatch.setattr(experiment.Stage, "train", lambda stage: pytest.fail(f"{stage.workdir} is trained"))
    with pytest.raises(UserError, match=says):
        experiment.main(["noisy", "--file", str(place / "all.toml"), "--folder", str(tmp_path), "--log",
                         str(tmp_path / "log.jsonl"), "--prompt-tokens", "8", *flag])


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_not_done(place, tmp_path):
    stage = experiment.run_stages(experiment.read_experiments(place / "all.toml")["noisy"], tmp_path, 0)[0]
    stage.workdir.mkdir(parents=True)
    save_config(stage.config, stage.workdir)
    (stage.workdir / "checkpoints").mkdir()
    assert not stage.is_done()


def test_a_logs_text_may_hold_what_unicode_calls_a_line_separator(tmp_path):
    logged = experiment.Path("docs/experiments.jsonl").read_text(encoding="utf-8").split("\n")[0]
    row = json.loads(logged) | {"note": "a\u2028b"}
    (tmp_path / "log.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert experiment.read_log(tmp_path / "log.jsonl") == [row]


def test_a_log_that_is_none_is_refused_before_anything_is_trained(place, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"experiment": "a", "seed": 0}\n')
    with pytest.raises(UserError, match="line 1 is not a row of an experiment"):
        experiment.main(["noisy", "--file", str(place / "all.toml"), "--folder", str(tmp_path), "--log",
                         str(tmp_path / "log.jsonl")])


def test_the_shipped_experiments_can_be_read_and_their_flags_parsed():
    known = experiment.read_experiments(experiment.Path("configs/experiments.toml"))
    assert "train_as_decoded" in known
    for one in known.values():
        stages = experiment.run_stages(one, experiment.Path("runs/experiments"), 0)
        stages[0].config  # noqa: B018
        if len(stages) == 1:
            assert stages[0].config.train.num_steps == experiment.baseline_stage(
                one, experiment.Path("runs/experiments"), 0).config.train.num_steps
