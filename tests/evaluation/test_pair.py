"""Held-out beginnings from windows made by hand, and the differences that forbid a comparison."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tokmat_jax.commands import data as command
from tokmat_jax.config.adopt import adopt
from tokmat_jax.data.corpus import corpus_of_run, prepare
from tokmat_jax.data.tokenizer import load_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.pair import Prompts, checkpoint_state, held_out_prompts, mismatches, prompts_of
from tokmat_jax.generation.generator import Generator
from tokmat_jax.storage.workdir import load_config

END = 0


def windows_of(*documents, seq_len=5):
    """Windows of a stream with end-of-text before each document, as a corpus has them; the remainder is dropped."""
    stream = [token for document in documents for token in (END, *document)]
    whole = len(stream) // seq_len * seq_len
    return [{"tokens": np.array(stream[at : at + seq_len], np.int32)} for at in range(0, whole, seq_len)]


def whole(prompts):
    return [[*p, *h] for p, h in zip(prompts.ids, prompts.human, strict=True)]


# Documents of 7, 2, 11 and 4 tokens: with end-of-text 28 ids, so that windows of 5 drop the last three.
DOCUMENTS = [range(10, 17), range(20, 22), range(30, 41), range(50, 54)]


def test_stretches_stay_inside_documents_and_take_turns():
    # Three tokens each: the first of every document that has three, then the second, then the third. Of 50..53 the
    # dropped remainder leaves 50 alone.
    found = held_out_prompts(windows_of(*DOCUMENTS), END, 99, prompt_tokens=2, new_tokens=1)
    assert whole(found) == [[10, 11, 12], [30, 31, 32], [13, 14, 15], [33, 34, 35], [36, 37, 38]]
    assert [len(ids) for ids in found.ids] == [2] * 5


def test_no_more_prompts_than_asked_for_and_no_note_then():
    found = held_out_prompts(windows_of(*DOCUMENTS), END, 3, prompt_tokens=1, new_tokens=2)
    assert whole(found) == [[10, 11, 12], [30, 31, 32], [13, 14, 15]]
    assert found.ids == [[10], [30], [13]]
    assert found.notes == ()


def test_fewer_prompts_than_asked_for_are_noted_with_both_numbers():
    found = held_out_prompts(windows_of(*DOCUMENTS), END, 4, prompt_tokens=4, new_tokens=3)
    assert whole(found) == [list(range(10, 17)), list(range(30, 37))]
    assert found.notes == ("4 prompts were asked for, the held-out text has 2",)


def test_text_before_the_first_end_of_text_is_a_document_too():
    windows = [{"tokens": np.array([1, 2, 3, END, 4])}, {"tokens": np.array([5, 6, 7, END, END])}]
    assert whole(held_out_prompts(windows, END, 9, 2, 1)) == [[1, 2, 3], [4, 5, 6]]


def test_where_no_document_is_long_enough_the_longest_is_named():
    with pytest.raises(UserError, match=r"no held-out document has 8 \+ 4 tokens, the longest has 11"):
        held_out_prompts(windows_of(*DOCUMENTS), END, 2, prompt_tokens=8, new_tokens=4)
    assert len(held_out_prompts(windows_of(*DOCUMENTS), END, 1, prompt_tokens=8, new_tokens=3).ids) == 1


def test_contexts_go_along_the_human_text_up_to_its_last_truth():
    prompts = Prompts([[1, 2, 3], [11, 12, 13]], [[4, 5, 6, 7, 8], [14, 15, 16, 17, 18]], ())
    # Five ids behind the prompt, two ahead: offsets from 0 to 3, three of them: 0, 1.5 → 1, 3.
    contexts, after = prompts.contexts(3, ahead=2)
    assert contexts == [[1, 2, 3], [2, 3, 4], [4, 5, 6], [11, 12, 13], [12, 13, 14], [14, 15, 16]]
    assert after.tolist() == [[4, 5], [5, 6], [7, 8], [14, 15], [15, 16], [17, 18]]


def test_one_context_is_the_prompt_itself():
    contexts, after = Prompts([[1, 2]], [[3, 4, 5]], ()).contexts(1, ahead=3)
    assert contexts == [[1, 2]]
    assert after.tolist() == [[3, 4, 5]]


# A corpus and a pair from the shared fixture: 48 positions


@pytest.fixture(scope="module")
def pair(runs_dir):
    return Generator.from_workdir(runs_dir / "run"), Generator.from_workdir(runs_dir / "ar")


@pytest.fixture(scope="module")
def corpus(runs_dir):
    return prepare(load_config(runs_dir / "run"))


def test_prompts_of_a_corpus_are_held_out_text(corpus, pair, runs_dir):
    config = pair[0].config
    found = prompts_of(corpus, config, 3, prompt_tokens=6, new_tokens=8)
    assert found.notes == ()
    text = (runs_dir / "corpus.txt").read_text().split("<|endoftext|>")
    for ids, human in zip(found.ids, found.human, strict=True):
        assert (len(ids), len(human)) == (6, 8)
        assert any(corpus.tokenizer.decode([*ids, *human]) in document for document in text)


def test_prompts_for_which_there_are_no_positions_are_shortened_with_a_note(corpus, pair):
    config = pair[0].config
    # 48 positions, 32 new tokens and a slot of the tail: 15 are left.
    found = prompts_of(corpus, config, 2, prompt_tokens=16, new_tokens=32)
    assert [len(ids) for ids in found.ids] == [15, 15]
    assert found.notes == ("prompts of 16 tokens were asked for, the model's positions leave 15",)
    assert prompts_of(corpus, config, 2, prompt_tokens=15, new_tokens=32).notes == ()
    several = prompts_of(corpus, config, 1000, prompt_tokens=16, new_tokens=32)
    assert len(several.notes) == 2
    assert several.notes[1] == f"1000 prompts were asked for, the held-out text has {len(several.ids)}"


def test_new_tokens_that_leave_no_prompt_are_refused(corpus, pair):
    assert len(prompts_of(corpus, pair[0].config, 1, prompt_tokens=3, new_tokens=46).ids[0]) == 1
    with pytest.raises(UserError, match="--max-new-tokens 47 leaves no room for a prompt: the model has 48 positions"):
        prompts_of(corpus, pair[0].config, 1, prompt_tokens=3, new_tokens=47)


def test_a_run_and_its_baseline_match(pair, runs_dir):
    assert mismatches(*pair, (runs_dir / "run", runs_dir / "ar")) == []


def changed(generator, **sections):
    """The same model under a config in which fields of its sections differ."""
    config = dataclasses.replace(generator.config, **{
        name: dataclasses.replace(getattr(generator.config, name), **fields) if isinstance(fields, dict) else fields
        for name, fields in sections.items()})
    return Generator(config, generator.params, generator.tokenizer)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"num_steps": 12}}, ["train.num_steps is 6, the baseline has 12"]),
        ({"train": {"batch_size": 8}}, ["train.batch_size is 4, the baseline has 8"]),
        ({"optimizer": {"learning_rate": 0.5}}, ["optimizer.learning_rate is 0.002, the baseline has 0.5"]),
        ({"data": {"seq_len": 40}}, ["data.seq_len is 48, the baseline has 40"]),
        ({"model": {"mlp_dim": 64}}, ["model.mlp_dim is None, the baseline has 64"]),
        ({"table": {"initial": "rows.npy"}}, ["table.initial is None, the baseline has 'rows.npy'"]),
        ({"init_from": "elsewhere"}, ["init_from is None, the baseline has 'elsewhere'"]),
        ({"model": {"dtype": "bfloat16"}, "train": {"num_steps": 3}},
         ["model.dtype is 'float32', the baseline has 'bfloat16'", "train.num_steps is 6, the baseline has 3"]),
        # What belongs to the method, to the machine or to the log may differ.
        ({"model": {"head_init": 0.1}}, []),
        ({"data": {"prepared_dir": "elsewhere"}, "train": {"log_every": 1}, "generation": {"tail_length": 1}}, []),
        ({"maturation": {"max_tail_length": 4}, "mesh": {"data": 1}}, []),
        ({"data": {"source": "files:another/place/of/the/same/text"}}, []),
    ],
)
def test_differences_in_data_model_and_budget_are_named(pair, runs_dir, sections, words):
    run, baseline = pair
    assert mismatches(run, changed(baseline, **sections), (runs_dir / "run", runs_dir / "ar")) == words


def test_a_pair_that_starts_from_imported_weights_matches(pair, runs_dir):
    # Such a baseline keeps the raw table and has no head; maturation needs the sphere and a head.
    plain = pair[1].config
    source = dataclasses.replace(plain, model=dataclasses.replace(plain.model, head="identity"),
                                 table=dataclasses.replace(plain.table, geometry="raw"))
    adopted = [Generator(adopt(one.config, source, "imported", one.config.objective.kind), one.params, one.tokenizer)
               for one in pair]
    assert [one.config.model.head for one in adopted] == ["linear", "identity"]
    run, baseline = adopted
    assert mismatches(run, baseline, (runs_dir / "run", runs_dir / "ar")) == []


def test_another_tokenizer_is_named(pair, runs_dir):
    run, baseline = pair
    folder = runs_dir / "ar" / "tokenizer"
    other = load_tokenizer(folder)
    other.prefix = (5,)
    twin = Generator(baseline.config, baseline.params, load_tokenizer(folder))
    workdirs = (runs_dir / "run", runs_dir / "ar")
    assert mismatches(run, twin, workdirs) == []
    assert mismatches(run, Generator(baseline.config, baseline.params, other), workdirs) == ["the tokenizers differ"]


@pytest.fixture
def copy(runs_dir, tmp_path):
    """A copy of the baseline's workdir that may be changed."""
    return shutil.copytree(runs_dir / "ar", tmp_path / "ar")


def test_the_differences_of_a_changed_workdir_are_found_from_disk(pair, runs_dir, copy):
    text = json.loads((copy / "config.json").read_text())
    text["optimizer"]["schedule"] = "linear"
    (copy / "config.json").write_text(json.dumps(text))
    assert mismatches(pair[0], Generator.from_workdir(copy), (runs_dir / "run", copy)) == [
        "optimizer.schedule is 'cosine', the baseline has 'linear'"]


def test_an_older_checkpoint_is_a_mismatch(pair, runs_dir, copy):
    shutil.rmtree(copy / "checkpoints" / "6")
    assert checkpoint_state(copy)[0] == 3
    assert mismatches(*pair, (runs_dir / "run", copy)) == ["the newest checkpoint is step 6, the baseline's 3"]


def test_steps_are_compared_as_numbers(copy):
    (copy / "checkpoints" / "10").mkdir()
    assert checkpoint_state(copy)[0] == 10


def test_a_workdir_without_a_checkpoint_is_refused(pair, runs_dir, copy):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        mismatches(*pair, (runs_dir / "run", copy))


def test_another_state_of_the_corpus_is_a_mismatch(pair, runs_dir, copy):
    facts = json.loads((copy / "corpus.json").read_text())
    known = facts["fingerprint"]
    (copy / "corpus.json").write_text(json.dumps(facts | {"fingerprint": "feed"}))
    assert mismatches(*pair, (runs_dir / "run", copy)) == [
        f"the corpus has the fingerprint {known}, the baseline's feed"]
    (copy / "corpus.json").unlink()
    assert mismatches(*pair, (runs_dir / "run", copy)) == [
        f"the corpus has the fingerprint {known}, the baseline's None"]


def test_a_renamed_tokenizer_with_the_same_ids_is_none_but_another_corpus_behind_it_is(pair, runs_dir, copy):
    facts = json.loads((copy / "corpus.json").read_text())
    renamed = facts | {"fingerprint": "feed", "tokenizer": {"kind": "workdir"}}
    (copy / "corpus.json").write_text(json.dumps(renamed))
    assert mismatches(*pair, (runs_dir / "run", copy)) == []
    (copy / "corpus.json").write_text(json.dumps(renamed | {"tokens": facts["tokens"] + 1}))
    [one] = mismatches(*pair, (runs_dir / "run", copy))
    assert one.endswith("the baseline's feed")


def test_a_state_tells_a_checkpoint_from_a_newer_one_of_the_same_step(copy):
    before = checkpoint_state(copy)
    assert checkpoint_state(copy) == before
    folder = copy / "checkpoints" / "6"
    shutil.copytree(folder, copy / "checkpoints" / "again")
    shutil.rmtree(folder)
    (copy / "checkpoints" / "again").rename(folder)
    (folder / "touched").write_text("")
    assert checkpoint_state(copy)[0] == before[0]
    assert checkpoint_state(copy) != before


@pytest.fixture
def outgrown(runs_dir, tmp_path):
    """Copies of `run` and `ar`, whose text has grown since."""
    text = tmp_path / "corpus.txt"
    text.write_text((runs_dir / "corpus.txt").read_text() + "<|endoftext|>the sea by the road" * 80)
    for name in ("run", "ar"):
        shutil.copytree(runs_dir / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["data"] |= {"source": f"files:{text}", "prepared_dir": str(tmp_path / "prepared")}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def _evaluate(folder):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib: pip install -e '.[report]'")
    from tokmat_jax.commands import evaluate

    evaluate.main(["--workdir", str(folder / "run"), "--baseline", str(folder / "ar"), "--output",
                   str(folder / "report"), "--num-prompts", "2", "--prompt-tokens", "4", "--max-new-tokens", "8"])


def _tokens_per_pass(folder):
    pytest.importorskip("matplotlib", reason="the report's plots need matplotlib: pip install -e '.[report]'")
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(benchmarks))
        script = importlib.import_module("tokens_per_pass")
    script.main(["--workdirs", str(folder / "run"), "--judge", str(folder / "ar")])


def _batch(folder):
    command.main(["batch", "--workdir", str(folder / "run"), "--position", "0"])


@pytest.mark.parametrize("reader", [_evaluate, _tokens_per_pass, _batch])
def test_no_reader_takes_another_text_for_that_of_a_run(outgrown, reader):
    """Nor does it prepare that text, which takes long and trains another tokenizer."""
    with pytest.raises(UserError, match=r"run was trained on a different version of this corpus \(fingerprint"):
        reader(outgrown)
    assert not (outgrown / "prepared").exists()


def test_a_corpus_with_other_ids_than_the_run_is_refused(runs_dir, tmp_path):
    """As where a library has changed since: the settings, and so the fingerprint, are the same."""
    workdir = shutil.copytree(runs_dir / "run", tmp_path / "run")
    config = load_config(workdir)
    assert corpus_of_run(config, workdir).facts == prepare(config).facts
    other = load_tokenizer(workdir / "tokenizer")
    other.prefix = (5,)
    other.save(workdir / "tokenizer")
    with pytest.raises(UserError, match=r"gives other ids than the one that .*run was trained with"):
        corpus_of_run(config, workdir)
