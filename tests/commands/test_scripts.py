"""The two scripts as a user runs them."""

import json
import os
import re
import shutil

import chex
import jax
import numpy as np
import pytest

import runs
import spelling
from scripts import ROOT, rows, script, stored
from tokmat_jax.commands import flags as cli
from tokmat_jax.commands import generate
from tokmat_jax.commands.outputs import check_files
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.trajectory import load_trajectory
from tokmat_jax.view.terminal import visible


def test_a_run_leaves_all_it_needs(runs_dir):
    workdir = runs_dir / "run"
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "tokenizer", "corpus.json", "checkpoints", "metrics.jsonl", "samples.jsonl",
                     "spikes.jsonl", "tensorboard", "lock"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "6"}
    logged = rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in logged if "train/loss" in row] == [2, 3, 4, 6]
    validation = [row for row in logged if "validation/mse" in row]
    assert [row["step"] for row in validation] == [3, 6]
    for name in ("info_nce", "top1/maturity_1", "top5/maturity_1", "top1/maturity_0.5", "entropy/maturity_1"):
        assert f"validation/{name}" in validation[-1]
    assert rows(workdir / "samples.jsonl")[0]["step"] == 6
    assert list((workdir / "tensorboard").iterdir())
    baseline = rows(runs_dir / "ar" / "metrics.jsonl")[-1]
    assert baseline["validation/perplexity"] == pytest.approx(np.exp(baseline["validation/cross_entropy"]))


@pytest.mark.parametrize("more", [(), ("--optimizer.name", "muon", "--objective.negatives", "batch",
                                       "--train.accumulation", "2", "--train.batch-size", "8", "--mesh.data", "2",
                                       "--mesh.fsdp", "2")],
                         ids=["plain", "muon, accumulation, fsdp"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, more):
    runs.write_corpus(tmp_path)
    runs.run(tmp_path, "whole", *more)
    # The power fails while step 6 is validated, behind the checkpoint of step 3.
    from tokmat_jax.commands import train

    original, calls = train.Loop.validate, []

    def stop(loop, step):
        calls.append(step)
        original(loop, step)
        if step == 6:
            raise RuntimeError("power cut")

    train.Loop.validate = stop
    try:
        with pytest.raises(RuntimeError, match="power cut"):
            runs.run(tmp_path, "cut", *more)
    finally:
        train.Loop.validate = original
    assert stored(tmp_path / "cut")[0] == 3
    runs.run(tmp_path, "cut", *more)
    for item in ("params", "optimizer"):
        whole, cut = stored(tmp_path / "whole", item), stored(tmp_path / "cut", item)
        assert whole[0] == cut[0] == 6
        chex.assert_trees_all_equal(whole[1], cut[1])
    clocks = ("train/tokens_per_second", "train/step_seconds", "train/host_memory_gb")
    logged = [[{key: value for key, value in row.items() if key not in clocks}
               for row in rows(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert logged[0] == logged[1]
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (tmp_path / "cut" / "samples.jsonl").read_text()


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(runs_dir, tmp_path, capsys):
    # A copy: other tests read the run as it is.
    shutil.copytree(runs_dir / "ar", tmp_path / "ar")
    runs.write_corpus(tmp_path)
    before = (tmp_path / "ar" / "metrics.jsonl").read_text()
    runs.run(tmp_path, "ar", "--objective.kind", "ar")
    assert "resuming after step 6" in capsys.readouterr().out
    assert (tmp_path / "ar" / "metrics.jsonl").read_text() == before
    runs.run(tmp_path, "ar", "--objective.kind", "ar", "--train.num-steps", "7")
    assert "train.num_steps 6 → 7" in capsys.readouterr().out
    assert rows(tmp_path / "ar" / "metrics.jsonl")[-1]["step"] == 7


def test_another_config_in_the_same_workdir_is_refused(runs_dir):
    with pytest.raises(UserError, match=r"model.num_layers = 2, this command has 3"):
        runs.run(runs_dir, "run", "--model.num-layers", "3")


def test_a_non_finite_loss_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    runs.write_corpus(tmp_path)
    flags = ("--optimizer.learning-rate", "1e30", "--optimizer.schedule", "constant", "--optimizer.warmup-steps", "3",
             "--optimizer.clip-norm", "1e30", "--train.checkpoint-every", "1", "--train.num-samples", "0",
             "--train.max-skipped", "0")
    with pytest.raises(UserError) as caught:
        runs.run(tmp_path, "bad", *flags)
    message = str(caught.value)
    step = int(message.split("at step ")[1].split(" ", maxsplit=1)[0])
    assert f"the last good checkpoint is step {step - 1}" in message
    assert stored(tmp_path / "bad")[0] == step - 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stored(tmp_path / "bad")[1]))


def test_an_update_that_breaks_the_parameters_is_never_saved(tmp_path):
    runs.write_corpus(tmp_path)
    # The loss of step 1 is fine, what its update leaves is not.
    flags = ("--optimizer.learning-rate", "3e38", "--optimizer.warmup-steps", "0", "--train.num-steps", "1",
             "--train.max-skipped", "0")
    said = r"param_norm is (inf|nan) at step 1 \(1 skipped in a row\); there is no checkpoint yet"
    with pytest.raises(UserError, match=said):
        runs.run(tmp_path, "bad", *flags)
    assert list((tmp_path / "bad" / "checkpoints").iterdir()) == []


def test_a_run_never_goes_on_with_another_text(tmp_path):
    path = runs.write_corpus(tmp_path)
    runs.run(tmp_path, "run", "--train.num-samples", "0")
    before = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text()
    path.write_text(path.read_text().replace("cat", "cow"))
    with pytest.raises(UserError, match="different version of this corpus"):
        runs.run(tmp_path, "run", "--train.num-samples", "0")
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text() == before


def test_a_workdir_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    runs.write_corpus(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir: cannot write into"):
        runs.run(tmp_path, "file")
    with pytest.raises(UserError, match=r"data.prepared_dir: cannot write into"):
        runs.run(tmp_path, "run", "--data.prepared-dir", str(tmp_path / "file"))


def test_the_longest_tail_that_fits_can_be_sampled_in_training(tmp_path):
    runs.write_corpus(tmp_path)
    workdir = runs.run(tmp_path, "run", "--generation.tail-length", "46", "--train.num-steps", "1")
    assert rows(workdir / "samples.jsonl")


# Orbax leaves futures behind when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_with_the_one_before(runs_dir, tmp_path):
    shutil.copytree(runs_dir / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "6" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoints/6 is damaged \(.*delete it to continue from step 3"):
        generate.main(["--workdir", str(tmp_path / "run"), "--prompt", "x"])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6" / "params")
    with pytest.raises(UserError, match=r"checkpoints/6 is damaged"):
        generate.main(["--workdir", str(tmp_path / "run"), "--prompt", "x"])


def test_a_given_table_is_where_training_starts(tmp_path):
    runs.write_corpus(tmp_path)
    table = np.random.default_rng(0).normal(size=(290, 16)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    given = ("--table.initial", str(tmp_path / "table.npy"), "--table.no-trainable", "--train.num-samples", "0")
    _, params = stored(runs.run(tmp_path, "given", *given))
    np.testing.assert_array_equal(params["table"], table)
    np.save(tmp_path / "table.npy", table[:, :3])
    with pytest.raises(UserError, match=r"is float32 \(290, 3\), expected finite floats \(290, 16\)"):
        runs.run(tmp_path, "other", *given)
    np.savez(tmp_path / "table.npz", table)
    with pytest.raises(UserError, match=r"table.initial: .* is no .npy file of numbers"):
        runs.run(tmp_path, "third", "--table.initial", str(tmp_path / "table.npz"))


def generated(capsys, *args):
    generate.main(list(map(str, args)))
    return capsys.readouterr()


def test_generate_prints_the_text_and_writes_every_sample(runs_dir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("who sat\n\na dog\n")
    shown = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat", "--prompt", "",
                      "--prompts-file", tmp_path / "prompts.txt", "--num-samples", 2, "--max-new-tokens", 5,
                      "--output", tmp_path / "out.jsonl", "--guidance-scale", 2)
    written = rows(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in written] == [p for p in ("the cat", "", "who sat", "a dog") for _ in range(2)]
    assert all(len(row["tokens"]) == len(row["entropy"]) == len(row["movement"]) <= 5 for row in written)
    assert written[0]["settings"]["guidance_scale"] == 2.0
    for row in written:
        assert visible(row["prompt"] + row["text"]) in shown.out


def test_stream_and_show_tail_show_the_same_text(runs_dir, tmp_path, capsys):
    plain = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat").out
    streamed = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat", "--stream").out
    assert streamed == plain
    tail = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat", "--show-tail", "--output",
                     tmp_path / "live.jsonl").out
    generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat", "--output", tmp_path / "batch.jsonl")
    [live], [batch] = rows(tmp_path / "live.jsonl"), rows(tmp_path / "batch.jsonl")
    assert live["tokens"] == batch["tokens"]
    np.testing.assert_allclose(live["movement"], batch["movement"], rtol=1e-4)
    assert "│" in tail
    # New lines inside the text split steps; the last step holds the whole text before its first bar.
    assert plain.strip() in tail


def test_every_way_to_see_a_sample_tells_one_text(runs_dir, tmp_path, capsys):
    # With SentencePiece's decoder the text of some ids is not that of the same ids after others.
    folder, tokenizer = tmp_path / "run", spelling.sentencepiece(290)
    shutil.copytree(runs_dir / "run", folder)
    tokenizer.save(folder / "tokenizer")
    generator, [cat] = Generator.from_workdir(folder), tokenizer.encode("cat")
    np.save(tmp_path / "cat.npy", np.asarray(generator.vocabulary.table[cat]))
    for steering, seed in ((20, 0), (0, 1), (0, 2)):
        flags = ["--workdir", folder, "--prompt", "the", "--seed", seed, "--tail-noise", 3, "--steering", steering,
                 "--steering-vector", tmp_path / "cat.npy"]
        plain = generated(capsys, *flags, "--output", tmp_path / "plain.jsonl").out
        [row] = rows(tmp_path / "plain.jsonl")
        whole = tokenizer.decode([*tokenizer.prefix, *tokenizer.encode("the"), *row["tokens"]])
        assert row["prompt"] + row["text"] == whole
        assert steering == 0 or whole == "the" + 8 * " cat"
        assert plain == visible(whole) + "\n"
        assert generated(capsys, *flags, "--stream", "--html", tmp_path / "page.html").out == plain
        found = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text())[1])["runs"][0]
        assert found["prompt"] + "".join(found["text"]) == visible(whole)
        shown = generated(capsys, *flags, "--show-tail", "--output", tmp_path / "shown.jsonl").out
        assert visible(whole) + "│" in shown
        assert rows(tmp_path / "shown.jsonl")[0]["text"] == row["text"]


def test_two_settings_beside_each_other_are_the_samples_of_both(runs_dir, tmp_path, capsys):
    arguments = ["--workdir", runs_dir / "run", "--prompt", "the cat", "--rate", "0.9", "0.7", "0.5", "0.3"]
    shown = generated(capsys, *arguments, "--show-tail", "--compare", "guidance-scale=3", "tail-noise=2",
                      "--output", tmp_path / "both.jsonl").out
    plain, guided = rows(tmp_path / "both.jsonl")
    for title in ("guidance scale 1, tail noise 0.3: ", "guidance scale 3, tail noise 2: "):
        assert shown.count(title + "the cat") == 8
    assert (plain["settings"]["guidance_scale"], guided["settings"]["guidance_scale"]) == (1.0, 3.0)
    assert plain["settings"]["rate"] == guided["settings"]["rate"] == [0.9, 0.7, 0.5, 0.3]
    for row, more in ((plain, ()), (guided, ("--guidance-scale", 3, "--tail-noise", 2))):
        generated(capsys, *arguments, *more, "--output", tmp_path / "alone.jsonl")
        assert rows(tmp_path / "alone.jsonl")[0]["tokens"] == row["tokens"]


def test_a_recorded_sample_is_printed_saved_and_replayed(runs_dir, tmp_path, capsys):
    arguments = ["--workdir", runs_dir / "run", "--prompt", "the cat", "--num-samples", 2]
    plain = generated(capsys, *arguments).out
    recorded = generated(capsys, *arguments, "--html", tmp_path / "replay.html", "--trajectory", tmp_path / "t.npz",
                         "--keep-vectors", "--compare", "tail-length=3", "--output", tmp_path / "out.jsonl")
    written = rows(tmp_path / "out.jsonl")
    assert [line for line in recorded.out.split("---\n") if line][::2] == [
        line for line in plain.split("---\n") if line]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl", "replay-1.html", "replay-2.html", "t-1.npz", "t-2.npz", "t-3.npz", "t-4.npz"]
    for number, row in enumerate(written, 1):
        found = load_trajectory(tmp_path / f"t-{number}.npz")
        assert found.text.tolist() == row["tokens"]
        assert found.vectors.shape == (8, row["settings"]["tail_length"], 16)
    page = (tmp_path / "replay-2.html").read_text()
    assert "tail length 4" in page
    assert "tail length 3" in page


def test_stable_commits_say_how_many_tokens_a_pass_they_made(runs_dir, tmp_path, capsys):
    shown = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat", "--prompt", "who", "--commit",
                      "stable", "--max-commit", 3, "--patience", 0, "--tolerance", 9, "--output", tmp_path / "o.jsonl")
    written = rows(tmp_path / "o.jsonl")
    tokens, passes = sum(len(row["tokens"]) for row in written), sum(row["passes"] for row in written)
    assert f"{tokens} tokens in {passes} passes, {tokens / passes:.2f} a pass" in shown.err
    assert all(row["passes"] == -(-len(row["tokens"]) // 3) for row in written)


def test_verified_commits_say_how_often_each_draft_was_right(runs_dir, tmp_path, capsys):
    shown = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat the cat the", "--commit", "verified",
                      "--draft", "both", "--max-commit", 3, "--output", tmp_path / "o.jsonl")
    [row] = rows(tmp_path / "o.jsonl")
    shares = ", ".join(f"{count / row['passes']:.0%}" for count in row["accepted"])
    assert f"{len(row['tokens'])} tokens in {row['passes']} passes" in shown.err
    assert f"drafts that were right, the nearest first: {shares}" in shown.err
    assert row["passes"] + sum(row["accepted"]) == len(row["tokens"])


def test_compared_commits_are_told_apart(runs_dir, capsys):
    shown = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat", "--commit", "verified",
                      "--show-tail", "--compare", "max-commit=2").err
    assert "max commit 4: committed when verified" in shown
    assert "max commit 2: committed when verified" in shown
    shown = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "the cat", "--show-tail", "--compare",
                      "commit=verified").err
    assert shown.count("committed when") == 1


def test_a_steering_vector_from_a_file_is_the_words(runs_dir, tmp_path, capsys):
    direction = Generator.from_workdir(runs_dir / "run").direction(["sea"])
    np.save(tmp_path / "v.npy", direction.astype(np.float64))
    arguments = ["--workdir", runs_dir / "run", "--prompt", "the cat", "--steering", "2"]
    assert generated(capsys, *arguments, "--steering-words", "sea").out == generated(
        capsys, *arguments, "--steering-vector", tmp_path / "v.npy").out


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "write"), [("p.txt", str), ("p.jsonl", lambda prompt: json.dumps(
    {"prompt": prompt}, ensure_ascii=False))])
def test_a_prompt_holds_whatever_does_not_end_its_line(name, write, end, tmp_path):
    # str.splitlines() splits at all of these.
    prompts = [f"a{sign}b" for sign in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    prompts += ["", "a\nb"] if name == "p.jsonl" else []
    (tmp_path / name).write_bytes("".join(write(prompt) + end for prompt in prompts).encode())
    assert generate.read_prompts(generate.Args(workdir="x", prompts_file=str(tmp_path / name))) == prompts


@pytest.mark.parametrize(("args", "says"), [
    ([], "no prompt"),
    (["--prompt", "x", "--tail-length", "0"], "must be at least 1, found 0"),
    (["--prompt", "x", "--max-maturity", "1.5"], "must lie in [0, 1]"),
    (["--prompt", "x", "--max-new-tokens", "99"], "needs 104 positions, the model has 48"),
    (["--prompt", "x", "--stream", "--prompt", "the cat " * 30], "prompt 2 has"),
    (["--prompt", "x", "--seed", str(2**32)], "seed must lie in 0..4294967295, found 4294967296"),
    (["--prompt", "x", "--guidance-scale", "nan"], "guidance_scale must be a finite number, found nan"),
    (["--prompt", "x", "--num-samples", "0"], "num_samples must be at least 1, found 0"),
    (["--prompt", "x", "--output", "/nowhere/x.jsonl"], "cannot write"),
    (["--prompts-file", "/nowhere"], "cannot read"),
    (["--prompt", "\udcff"], "prompt 1 is not valid Unicode"),
    (["--promt", "x"], "unknown option --promt; nearest: --prompt"),
    (["--prompt", "x", "--rate", "0.5", "0.5"], "one per slot of the tail (4), found (0.5, 0.5)"),
    (["--prompt", "x", "--rate", "1", "1", "1", "1.5"], "rate must lie in [0, 1], found (1.0, 1.0, 1.0, 1.5)"),
    (["--prompt", "x", "--history-smoothing", "1"], "history_smoothing must lie in [0, 1), found 1.0"),
    (["--prompt", "x", "--fresh-noise", "-1"], "fresh_noise must not be negative, found -1.0"),
    (["--prompt", "x", "--steering", "1"], "steering needs a direction: give --steering-words"),
    (["--prompt", "x", "--steering-words", "sea"], "does nothing by itself: give its strength too"),
    (["--prompt", "x", "--steering", "1", "--steering-words", ""], "steering_words must not be blank, found ('',)"),
    (["--prompt", "x", "--steering", "1", "--steering-words", "\udcff"], "is no word"),
    (["--prompt", "x", "--steering", "1e39", "--steering-words", "sea"], "must lie within ±1,000,000, found 1e+39"),
    (["--prompt", "x", "--steering", "1", "--steering-words", "a", "--steering-vector", "x.npy"], "both set"),
    (["--prompt", "x", "--steering-slots", "1"], "--steering-slots does nothing by itself"),
    (["--prompt", "x", "--patience", "2"], "--patience has no effect without --commit stable: add it"),
    (["--prompt", "x", "--commit", "stable", "--patience", "99999999999"], "must lie within ±1,000,000"),
    (["--prompt", "x", "--show-tail", "--compare", "tail-length="], "--compare takes NAME=VALUE"),
    (["--prompt", "x", "--show-tail", "--compare", "tail-length=2", "tail-length=3"], "each one once"),
    (["--prompt", "x", "--stream", "--html", "x.html", "--compare", "tail-length=2"], "--stream shows one run"),
    (["--prompt", "x", "--html", ""], "--html: '' names no file"),
    (["--prompt", "x", "--html", "..", "--num-samples", "2"], "--html: '..' names no file"),
    (["--prompt", "x", "--trajectory", "/"], "--trajectory: '/' names no file"),
    (["--prompt", "x", "--html", "/tmp"], "--html: /tmp is a folder"),
    (["--prompt", "x", "--html", f"/tmp/{'x' * 300}"], "File name too long"),
    (["--prompt", "x", "--html", "/tmp/same", "--output", "/tmp/same"], "--html would write the same file"),

    (["--prompt", "x", "--steering", "1", "--steering-vector", "/nowhere.npy"], "/nowhere.npy is no .npy file"),
    (["--prompt", "x", "--steering", "1", "--steering-vector", __file__], "is no .npy file of numbers"),
    (["--prompt", "x", "--steering-slots", "4"], "steering_slots must lie in 0..3 (K = 4), found (4,)"),
    (["--prompt", "x", "--commit", "stable", "--max-commit", "0"], "max_commit must be positive, found 0"),
    (["--prompt", "x", "--commit", "stable", "--tolerance", "0"], "tolerance must be positive, found 0.0"),
    (["--prompt", "x", "--draft", "lookup"], "--draft has no effect without --commit verified: add it"),
    (["--prompt", "x", "--max-commit", "2"], "--max-commit has no effect without --commit stable or verified"),
    (["--prompt", "x", "--commit", "verified", "--patience", "2"], "--patience has no effect without --commit stable"),
    (["--prompt", "x", "--commit", "verified", "--model-tail-length", "-1"], "must not be negative, found -1"),
    (["--prompt", "x", "--entropy-candidates", "0"], "entropy_candidates must be at least 1, found 0"),
    (["--prompt", "x", "--commit", "stable", "--patience", "-1"], "patience must not be negative, found -1"),
    (["--prompt", "x", "--compare", "guidance-scale=2"], "add --show-tail or --html FILE"),
    (["--prompt", "x", "--show-tail", "--compare", "guidance-scale"], "--compare takes NAME=VALUE"),
    (["--prompt", "x", "--show-tail", "--compare", "seed=2"], "with the name of a setting"),
    (["--prompt", "x", "--show-tail", "--compare", "max-maturity=2"], "must lie in [0, 1]"),
    (["--prompt", "x", "--show-tail", "--compare", "tail-noise=-1"], "tail_noise must not be negative, found -1.0"),
    (["--prompt", "x", "--html", "/nowhere/x.html"], "--html: cannot write /nowhere/x.html: No such file"),
    (["--prompt", "x", "--trajectory", "/nowhere/x.npz"], "--trajectory: cannot write"),
    (["--prompt", "x", "--keep-vectors"], "has no effect without --trajectory FILE"),
])
def test_a_mistake_in_generating_is_one_line(runs_dir, args, says):
    with pytest.raises(UserError) as caught:
        generate.main(["--workdir", str(runs_dir / "run"), *args])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mistake", [["--steering", "1"], ["--html", "/nowhere/x.html"], ["--trajectory", "/"],
                                     ["--steering", "1", "--steering-vector", "/nowhere.npy"]])
def test_a_refused_command_leaves_the_files_of_an_earlier_one(runs_dir, tmp_path, mistake):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(UserError):
        generate.main(["--workdir", str(runs_dir / "run"), "--prompt", "x", "--output", str(tmp_path / "out.jsonl"),
                       *mistake])
    assert (tmp_path / "out.jsonl").read_text() == "precious"


@pytest.mark.parametrize("flag", ["--output", "--html", "--trajectory"])
@pytest.mark.parametrize("name", ["p.txt", "./sub/../p.txt", "link", "hard", "v.npy"])
def test_what_a_command_reads_is_not_overwritten(runs_dir, tmp_path, flag, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "p.txt").write_text("the cat\n")
    (tmp_path / "link").symlink_to("p.txt")
    (tmp_path / "hard").hardlink_to(tmp_path / "p.txt")
    np.save(tmp_path / "v.npy", np.ones(16))
    before = [(tmp_path / file).read_bytes() for file in ("p.txt", "v.npy")]
    with pytest.raises(UserError, match=f"{flag} would overwrite .*, which --(prompts-file|steering-vector) reads"):
        generate.main(["--workdir", str(runs_dir / "run"), "--prompts-file", str(tmp_path / "p.txt"), "--steering", "1",
                       "--steering-vector", str(tmp_path / "v.npy"), flag, f"{tmp_path}/{name}"])
    assert [(tmp_path / file).read_bytes() for file in ("p.txt", "v.npy")] == before


def test_files_are_tried_without_a_trace(tmp_path):
    (tmp_path / "link").symlink_to("later.jsonl")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "old").write_text("precious")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a reader
    names = {path.name for path in tmp_path.iterdir()}
    check_files({"--output": [tmp_path / "link"], "--html": [tmp_path / "old", tmp_path / "new"],
                 "--trajectory": [tmp_path / "pipe"]}, {})
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "old").read_text() == "precious"
    with pytest.raises(UserError, match=r"--output: cannot write .*loop: "):
        check_files({"--output": [tmp_path / "loop"]}, {})
    with pytest.raises(UserError, match="--output and --html would write the same file"):
        check_files({"--output": [tmp_path / "link"], "--html": [tmp_path / "later.jsonl"]}, {})


def test_an_output_is_written_through_a_link(runs_dir, tmp_path):
    (tmp_path / "link").symlink_to("later.jsonl")
    generate.main(["--workdir", str(runs_dir / "run"), "--prompt", "the cat", "--output", str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink()
    assert rows(tmp_path / "later.jsonl")[0]["prompt"] == "the cat"


def test_training_refuses_steering_without_a_direction_before_its_first_step(tmp_path):
    runs.write_corpus(tmp_path)
    with pytest.raises(UserError, match=r"generation\.steering needs a direction"):
        runs.run(tmp_path, "run", "--generation.steering", "0.5")
    assert not (tmp_path / "run").exists()


def test_a_longer_tail_than_trained_is_noted_and_the_baseline_has_none(runs_dir, capsys):
    shown = generated(capsys, "--workdir", runs_dir / "run", "--prompt", "x", "--tail-length", 20)
    assert "longer than any in training (K_max 16)" in shown.err
    for flags in (["--tail-length", "4"], ["--commit", "stable"], ["--steering-vector", "x.npy"]):
        with pytest.raises(UserError, match=f"{flags[0]}: .* it has no tail"):
            generate.main(["--workdir", str(runs_dir / "ar"), "--prompt", "x", *flags])


def test_a_workdir_without_a_checkpoint_or_with_another_model_says_so(runs_dir, tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        generate.main(["--workdir", str(tmp_path), "--prompt", "x"])
    shutil.copytree(runs_dir / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["num_layers"] = 5
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"blocks/attention_norm/bias is float32 \(2, 16\), the config wants"):
        generate.main(["--workdir", str(tmp_path / "run"), "--prompt", "x"])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        generate.main(["--workdir", str(tmp_path / "run"), "--prompt", "x"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_trains_two_steps_scaled_down(path, runs_dir, tmp_path):
    runs.write_corpus(tmp_path)
    starts_elsewhere = cli.load_config_file(path).init_from is not None
    tokenizer = ["--init-from", str(runs_dir / "ar")] if starts_elsewhere else ["--tokenizer.kind", "bpe",
                                                                               "--tokenizer.name", ""]
    small = runs.arguments(tmp_path, "small", "--config", str(path), "--train.num-steps", "2", *tokenizer,
                           "--maturation.max-tail-length", "8", "--train.accumulation", "1")
    assert cli.parse_config(small).train.num_steps == 2
    from tokmat_jax.commands import train

    with jax.numpy_dtype_promotion("standard"):
        train.main(small)
    assert stored(tmp_path / "small")[0] == 2


def test_the_quickstart_with_few_steps_then_text_from_what_it_left(tmp_path):
    few = ["--train.num-steps", 4, "--train.batch-size", 2, "--train.eval-batches", 1, "--train.num-samples", 1,
           "--workdir", tmp_path / "quickstart", "--data.prepared-dir", tmp_path / "prepared"]
    trained = script("train.py", "--config", "configs/quickstart.py", *few)
    assert trained.returncode == 0, trained.stderr
    assert "step 4 validation" in trained.stdout
    assert "│" in trained.stdout
    text = script("generate.py", "--workdir", tmp_path / "quickstart", "--prompt", "In the beginning",
                  "--max-new-tokens", 8)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("In the beginning")
    assert not text.stderr
    wrong = script("generate.py", "--workdir", tmp_path / "quickstart", "--prompt", "x", "--tail-length", 0)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


def test_a_trace_of_chosen_steps_is_written(tmp_path):
    runs.write_corpus(tmp_path)
    workdir = runs.run(tmp_path, "traced", "--train.profile", "2", "3", "--train.num-steps", "4")
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert not (runs.run(tmp_path, "plain", "--train.num-steps", "2") / "profile").exists()
