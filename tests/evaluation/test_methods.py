"""The report's rows and curves, and that each method's text is what its decoder writes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import runs
from tokmat_jax.config import GenerationConfig
from tokmat_jax.evaluation.measurement import Options
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
from tokmat_jax.generation.generator import Generator

ROOMS = [1, 2, 3, 4, 8, 16, 63, 64, 500]
MATURATION = Method("strong", "maturation", {"tail_length": 2, "tail_noise": 1.0, "max_maturity": 0.5})
GREEDY = Method("greedy", "sampling", {})
SAMPLED = Method("temperature 1", "sampling", {"temperature": 1.0})
BEST = Method("best of 2", "best_of", {"count": 2})
NEW = 8
"""Batches are of four rows everywhere, so that each decoder compiles one shape."""


def options(seed, forbid_end_of_text=False):
    return Options(NEW, seed, 10, 4, "", 2, forbid_end_of_text)


def by_name(methods):
    return {method.name: method for method in methods}


def tail_length(method):
    return method.settings.get("tail_length", 8) if method.kind == "maturation" else 0


# The rows and the curves


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_begins_with_human_text_and_names_nothing_twice(room):
    rows = table_methods(GenerationConfig(), room)
    assert rows[0] == HUMAN
    assert len(by_name(rows)) == len(rows)
    assert sum(row.kind == "human" for row in rows) == 1


@pytest.mark.parametrize("room", ROOMS)
def test_tails_beyond_the_room_are_left_out_and_no_others(room):
    for methods, everything in ((table_methods(GenerationConfig(), room), table_methods(GenerationConfig(), 500)),
                                (curve_methods(room), curve_methods(500))):
        assert methods == [method for method in everything if tail_length(method) <= room]
    assert {tail_length(row) for row in table_methods(GenerationConfig(), 500)} == {0, 1, 4, 8, 16, 64}


def test_the_table_has_the_rows_that_the_question_needs():
    rows = by_name(table_methods(GenerationConfig(), 500))
    assert rows["greedy"].settings == {}
    assert rows["greedy, penalty 1.2"].settings == {"repetition_penalty": 1.2}
    assert rows["nucleus 0.95"].settings == {"temperature": 1.0, "top_p": 0.95}
    assert (rows["contrastive search"].kind, rows["best of 16"].kind) == ("contrastive", "best_of")
    assert rows["plain, guidance 2"].settings == {"guidance_scale": 2.0}
    assert rows["maturation, plain (K 8)"].settings == {}
    assert {row.is_baseline for row in rows.values() if row.kind in ("human", "maturation")} == {False}
    assert all(row.is_baseline for row in rows.values() if row.kind not in ("human", "maturation"))


def test_the_runs_own_settings_are_carried_over_and_only_they():
    own = GenerationConfig(tail_length=4, tail_noise=1.0, max_maturity=0.5, max_new_tokens=7, entropy_temperature=0.1)
    rows = by_name(table_methods(own, 500))
    # The number of tokens and the temperature of the entropy are the report's, the same for every row.
    assert rows["maturation, the run's setting"].settings == {
        "tail_length": 4, "tail_noise": 1.0, "max_maturity": 0.5}
    other = by_name(table_methods(GenerationConfig(), 500))
    assert {name for name, row in rows.items() if other[name] != row} == {"maturation, the run's setting"}


def test_the_runs_own_row_is_left_out_where_its_tail_does_not_fit():
    assert "maturation, the run's setting" not in by_name(table_methods(GenerationConfig(tail_length=12), 11))
    assert "maturation, the run's setting" in by_name(table_methods(GenerationConfig(tail_length=12), 12))


def test_every_curve_has_a_course_and_every_setting_its_name():
    methods = curve_methods(500)
    assert len(by_name(methods)) == len(methods)
    curves = {}
    for method in methods:
        curves.setdefault(method.curve, []).append(method)
    assert all(name and len(one) >= 2 for name, one in curves.items())
    for one in curves.values():
        # The settings of a curve differ from each other, and a curve is one side's alone.
        assert len({repr(sorted(method.settings.items())) for method in one}) == len(one)
        assert len({method.is_baseline for method in one}) == 1
    assert {True, False} == {method.is_baseline for method in methods}


def test_a_method_is_deterministic_where_nothing_is_drawn():
    rows = table_methods(GenerationConfig(), 500) + curve_methods(500)
    assert {row.name for row in rows if row.is_deterministic} == {
        "human", "greedy", "greedy, penalty 1.2", "contrastive search", "temperature 0",
        *(f"greedy, penalty {p}" for p in ("1.05", "1.1", "1.3", "1.5")),
        *(f"greedy, repulsion {r}" for r in ("0.05", "0.1", "0.2", "0.3", "0.4", "0.6", "0.8", "1"))}


def test_a_name_stands_for_one_setting_in_table_and_curves():
    rows, curves = by_name(table_methods(GenerationConfig(), 500)), by_name(curve_methods(500))
    for name in rows.keys() & curves.keys():
        assert rows[name].settings == curves[name].settings
        assert rows[name].kind == curves[name].kind


def test_stable_commits_begin_with_one_token_a_step_and_differ_in_nothing_else():
    curves = {}
    for method in stable_methods():
        curves.setdefault(method.curve, []).append(method)
    for (first, *others), base in zip(curves.values(), ({}, {"repulsion": 0.4}), strict=True):
        assert first.settings == base
        for other in others:
            assert {name: other.settings[name] for name in base} == base
            assert set(other.settings) - set(base) == {"commit", "patience", "tolerance"}
            assert other.settings["commit"] == "stable"
    assert [method for method in curve_methods(500) if method.curve == "stable commits"] == curves["stable commits"]


def test_tokens_per_pass_count_the_end_of_text_too(writer, prompts):
    assert Written([[1, 2, 3], [4]], [True, False], None, [2, 1]).tokens_per_pass == 5 / 3
    assert Written([[1, 2, 3]], [True], None).tokens_per_pass == 1.0
    at_once = Method("stable", "maturation", {"commit": "stable", "patience": 0, "tolerance": 9.0})
    assert writer.write(at_once, prompts).tokens_per_pass > 1.5
    assert writer.write(MATURATION, prompts).tokens_per_pass == 1.0


# What they write


@pytest.fixture(scope="module")
def writer(runs_dir):
    run, baseline = (Generator.from_workdir(runs_dir / name) for name in ("run", "ar"))
    return Writer(run, baseline, options(3))


@pytest.fixture(scope="module")
def prompts(writer):
    ids = [writer.run.tokenizer.encode(text) for text in ("the cat sat", "a dog ran", "who sat by", "the sea")]
    return Prompts(ids, [[1, 2, 3, 4, 5, 6, 7, 8]] * 4, ())


def stripped(sample):
    return sample.tokens[:-1] if sample.finished else sample.tokens


def test_human_text_is_the_prompts_own(writer, prompts):
    written = writer.write(HUMAN, prompts)
    assert written.tokens == prompts.human
    assert written.finished == [False] * 4
    assert written.entropy is None


def test_greedy_is_what_the_generator_of_the_baseline_writes(writer, prompts):
    settings = dataclasses.replace(writer.baseline.config.generation, max_new_tokens=NEW)
    want = writer.baseline.generate(prompts.ids, settings, batch_size=4)
    written = writer.write(GREEDY, prompts)
    assert written.tokens == [stripped(sample) for sample in want]
    assert written.finished == [sample.finished for sample in want]
    assert written.entropy is None


def test_maturation_is_what_the_generator_of_the_run_writes_with_the_methods_settings(writer, prompts):
    settings = GenerationConfig(tail_length=2, tail_noise=1.0, max_maturity=0.5, max_new_tokens=NEW)
    want = writer.run.generate(prompts.ids, settings, seed=3, batch_size=4)
    written = writer.write(MATURATION, prompts)
    assert written.tokens == [stripped(sample) for sample in want]
    assert written.finished == [sample.finished for sample in want]
    np.testing.assert_allclose(written.entropy, [np.mean(sample.entropy) for sample in want], rtol=1e-5)
    weak = Method("weak", "maturation", {"tail_length": 2})
    assert written.tokens != writer.write(weak, prompts).tokens
    # What a method does not set is the plain algorithm's, not the run's own (K 4).
    assert writer.run.config.generation.tail_length == 4
    assert writer.settings(Method("plain", "maturation")) == GenerationConfig(max_new_tokens=NEW)


def test_the_seed_decides_what_is_drawn(writer, prompts):
    other = Writer(writer.run, writer.baseline, options(4))
    for method in (MATURATION, SAMPLED):
        assert writer.write(method, prompts) == writer.write(method, prompts)
        assert writer.write(method, prompts).tokens != other.write(method, prompts).tokens
    assert writer.write(GREEDY, prompts).tokens == other.write(GREEDY, prompts).tokens


@pytest.fixture(scope="module")
def ending(writer):
    """A writer of models whose every prediction is nine times the vector of end-of-text."""
    def one(generator):
        end = generator.vocabulary.table[generator.tokenizer.end_of_text]
        backbone = dict(generator.backbone)
        norm, kernel = backbone["final_norm"], backbone["head"]["kernel"]
        backbone["final_norm"] = {"scale": 0.0 * norm["scale"], "bias": jnp.zeros_like(norm["bias"]).at[0].set(1.0)}
        backbone["head"] = {"kernel": jnp.zeros_like(kernel).at[0].set(9.0 * end)}
        return Generator(generator.config, generator.params | {"backbone": backbone}, generator.tokenizer)

    return Writer(one(writer.run), one(writer.baseline), options(0))


@pytest.mark.parametrize("method", [GREEDY, SAMPLED, BEST, MATURATION], ids=lambda method: method.name)
def test_end_of_text_is_taken_off_and_told(ending, prompts, method):
    written = ending.write(method, prompts)
    assert written.tokens == [[]] * 4
    assert written.finished == [True] * 4
    # Of independent samples end-of-text is the first token, and nothing stands behind it.
    first = ending.first_tokens(method, prompts.ids, ahead=3, samples=2)
    end = ending.run.tokenizer.end_of_text
    assert first.tolist() == [[[end, -1, -1]] * 2] * 4


CONTRASTIVE = Method("contrastive search", "contrastive", {"top_k": 3, "alpha": 0.6})
REPELLED = Method("greedy, repulsion 0.4", "repulsion", {"repulsion": 0.4})


@pytest.mark.parametrize("method", [SAMPLED, CONTRASTIVE, REPELLED, MATURATION],
                         ids=lambda method: method.name)
def test_no_sample_ends_if_that_is_forbidden(ending, prompts, method):
    forbidding = Writer(ending.run, ending.baseline, options(0, forbid_end_of_text=True))
    written = forbidding.write(method, prompts)
    assert [len(tokens) for tokens in written.tokens] == [NEW] * 4
    assert written.finished == [False] * 4
    assert all(ending.run.tokenizer.end_of_text not in tokens for tokens in written.tokens)


@pytest.mark.parametrize("method", [GREEDY, CONTRASTIVE],
                         ids=lambda method: method.name)
def test_a_deterministic_method_is_repeated(writer, prompts, method):
    found = writer.first_tokens(method, prompts.ids, ahead=3, samples=4)
    assert found.shape == (4, 4, 3)
    assert (found == found[:, :1]).all()
    for row, tokens, finished in zip(found, *dataclasses.astuple(writer.write(method, prompts))[:2], strict=True):
        end = [writer.run.tokenizer.end_of_text] if finished else []
        assert [token for token in row[0].tolist() if token >= 0] == [*tokens, *end][:3]


@pytest.mark.parametrize("method", [SAMPLED, MATURATION, BEST],
                         ids=lambda method: method.name)
def test_samples_are_independent_and_stay_with_their_context(writer, prompts, method):
    found = writer.first_tokens(method, prompts.ids, ahead=4, samples=6)
    assert found.shape == (4, 6, 4)
    assert all(len({tuple(sample) for sample in row.tolist()}) > 1 for row in found)
    backwards = writer.first_tokens(method, prompts.ids[::-1], ahead=4, samples=6)
    np.testing.assert_array_equal(backwards[::-1], found)


def test_the_first_tokens_are_the_decoders_own_samples(writer, prompts):
    settings = dataclasses.replace(writer.settings(MATURATION), max_new_tokens=4)
    want = [sample.tokens for sample in writer.run.generate(prompts.ids, settings, num_samples=3, seed=3,
                                                                batch_size=4)]
    found = writer.first_tokens(MATURATION, prompts.ids, ahead=4, samples=3)
    assert [[token for token in row if token >= 0] for row in found.reshape(12, 4).tolist()] == want


def test_the_largest_seed_still_gives_the_best_of_its_samples(writer, prompts):
    largest = Writer(writer.run, writer.baseline, options(2**32 - 1))
    found = largest.first_tokens(BEST, prompts.ids, ahead=2, samples=2)
    assert found.shape == (4, 2, 2)


@pytest.fixture(scope="module")
def bytes_writer(runs_dir, writer):
    """The same run beside a baseline over single bytes."""
    folder = runs.run(runs_dir, "bytes", "--objective.kind", "ar", "--tokenizer.kind", "bytes",
                      "--train.num-samples", "0")
    return Writer(writer.run, Generator.from_workdir(folder), options(3))


def test_a_baseline_with_another_tokenizer_reads_and_writes_through_text(bytes_writer, prompts):
    run, baseline = bytes_writer.run.tokenizer, bytes_writer.baseline
    settings = dataclasses.replace(baseline.config.generation, max_new_tokens=NEW)
    want = baseline.generate([run.decode(ids) for ids in prompts.ids], settings, batch_size=4)
    written = bytes_writer.write(GREEDY, prompts)
    assert [run.decode(tokens) for tokens in written.tokens] == [
        run.decode(run.encode(sample.text)[:NEW]) for sample in want]
    assert all(0 <= token < run.vocab_size for tokens in written.tokens for token in tokens)
    assert all(len(tokens) <= NEW for tokens in written.tokens)
