import dataclasses

import numpy as np
import pytest

import tiny
from tokmat_jax.config import TokenizerConfig
from tokmat_jax.data.tokenizer import make_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.generator import Generator


@pytest.fixture(scope="module")
def generator(runs_dir):
    return Generator.from_workdir(runs_dir / "run")


PROMPTS = ["the cat", "", "a dog ran to the sea. the", "who"]


def settings_of(generator, **fields):
    return dataclasses.replace(generator.config.generation, **fields)


def test_a_sample_depends_on_its_prompt_its_number_and_the_seed_alone(generator):
    settings = settings_of(generator, tail_noise=1.0, max_maturity=0.5)
    together = generator.generate(PROMPTS, settings, num_samples=3, seed=5)
    assert [(sample.prompt, sample.number) for sample in together] == [(p, n) for p in PROMPTS for n in range(3)]
    backwards = generator.generate(PROMPTS[::-1], settings, num_samples=3, seed=5, batch_size=5)
    for sample in together:
        [same] = [other for other in backwards if (other.prompt, other.number) == (sample.prompt, sample.number)]
        assert same.tokens == sample.tokens
        np.testing.assert_allclose(same.entropy, sample.entropy, rtol=1e-5)
        [alone] = [one for one in generator.generate([sample.prompt], settings, sample.number + 1, seed=5, batch_size=1)
                   if one.number == sample.number]
        assert alone.tokens == sample.tokens


def test_seeds_and_numbers_give_other_noise(generator):
    settings = settings_of(generator, tail_noise=3.0, max_maturity=0.3)
    samples = generator.generate(["the"], settings, num_samples=6) + generator.generate(["the"], settings, 6, seed=1)
    assert len({tuple(sample.entropy) for sample in samples}) == 12


def test_a_stream_is_the_same_sample_with_its_tail(generator):
    [sample] = generator.generate(["the cat"])
    moments = list(generator.stream("the cat"))
    assert moments[-1].tokens == sample.tokens
    assert moments[-1].text == sample.text
    np.testing.assert_allclose([m.entropy[0] for m in moments], sample.entropy, rtol=1e-5)
    np.testing.assert_allclose([m.movement[0] for m in moments], sample.movement, rtol=1e-4)
    assert all(len(m.tail) == 3 and len(m.entropy) == 4 for m in moments)


def test_every_row_has_its_own_measure_of_each_token(generator):
    for sample in generator.generate(PROMPTS):
        assert 1 <= len(sample.tokens) <= 8
        assert len(sample.tokens) == len(sample.entropy) == len(sample.movement)
        assert sample.finished == (sample.tokens[-1] == generator.tokenizer.end_of_text)
        assert sample.finished or len(sample.tokens) == 8
        assert all(0 < value <= np.log(generator.tokenizer.vocab_size) + 1e-4 for value in sample.entropy)


def test_another_length_or_number_within_a_bucket_compiles_nothing(runs_dir):
    generator = Generator.from_workdir(runs_dir / "run")
    generator.generate(["the cat sat"])
    count = generator.compilations()
    generator.generate(["a"])
    generator.generate(["who sat by"], settings_of(generator, max_new_tokens=5, tail_noise=0.9, max_maturity=0.4))
    assert generator.compilations() == count
    list(generator.stream("the"))
    count = generator.compilations()
    list(generator.stream("a dog ran"))
    assert generator.compilations() == count
    guided = settings_of(generator, guidance_scale=2.0)
    generator.generate(["the"], guided)
    count = generator.compilations()
    generator.generate(["the"], dataclasses.replace(guided, guidance_scale=1.5))
    assert generator.compilations() == count


def test_every_length_of_a_bucket_has_the_same_shapes():
    config = dataclasses.replace(tiny.CONFIG, data=dataclasses.replace(tiny.CONFIG.data, seq_len=256))
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    generator = Generator(config, tiny.shaken_params(config, 257), tokenizer)
    for length in range(1, 17):
        generator.generate(["x" * length], settings_of(generator, max_new_tokens=56))
    assert generator.compilations() == 2


def test_the_baseline_decodes_greedily_with_the_same_loop(runs_dir):
    generator = Generator.from_workdir(runs_dir / "ar")
    one, two = generator.generate(["the cat"], num_samples=2)
    assert one.tokens == two.tokens
    assert next(iter(generator.stream("the cat"))).tail == []


def test_too_many_positions_are_refused_with_the_numbers(generator):
    with pytest.raises(UserError, match=r"prompt 2 has \d+ tokens; with 8 new ones and a tail of 4 it needs"):
        generator.generate(["the", "the cat sat " * 20])
    # 48 positions: an empty prompt takes one (end-of-text), the tail four.
    generator.generate([""], settings_of(generator, max_new_tokens=43))
    with pytest.raises(UserError, match="needs 49 positions, the model has 48"):
        generator.generate([""], settings_of(generator, max_new_tokens=44))


@pytest.mark.parametrize("name", ["run", "ar"])
def test_repulsion_changes_what_is_written_and_depends_on_nothing_but_the_sample(runs_dir, name):
    generator = Generator.from_workdir(runs_dir / name)
    settings = settings_of(generator, repulsion=1.0)
    together = generator.generate(PROMPTS, settings)
    assert [one.tokens for one in together] != [one.tokens for one in generator.generate(PROMPTS)]
    for prompt, sample in zip(PROMPTS, together, strict=True):
        [alone] = generator.generate([prompt], settings)
        assert alone.tokens == sample.tokens == list(generator.stream(prompt, settings))[-1].tokens


def test_with_repulsion_a_text_that_is_continued_goes_on_as_it_would_have(generator):
    # What repels is a function of the committed text, whether it was given or written; K = 1 at rate 1 has no other.
    settings = settings_of(generator, repulsion=1.0, tail_length=1, max_maturity=1.0, max_new_tokens=8)
    ids = generator.tokenizer.encode("the cat sat on")
    [whole] = generator.generate([ids], settings)
    [rest] = generator.generate([[*ids, *whole.tokens[:4]]], dataclasses.replace(settings, max_new_tokens=4))
    assert len(whole.tokens) == 8
    assert rest.tokens == whole.tokens[4:]


def test_a_baselines_own_settings_leave_out_the_repulsion_of_its_config(runs_dir):
    plain = Generator.from_workdir(runs_dir / "ar")
    config = dataclasses.replace(plain.config, generation=settings_of(plain, repulsion=1.0))
    repelled = Generator(config, plain.params, plain.tokenizer)
    assert [one.tokens for one in repelled.generate(PROMPTS)] == [one.tokens for one in plain.generate(PROMPTS)]


def test_repulsion_is_refused_where_tokens_are_written_with_a_table_of_their_own(runs_dir):
    tied = Generator.from_workdir(runs_dir / "ar")
    config = dataclasses.replace(tied.config, table=dataclasses.replace(tied.config.table, tied=False))
    untied = Generator(config, tied.params, tied.tokenizer)
    with pytest.raises(UserError, match=r"an output table of its own: leave out --repulsion"):
        untied.generate(["the cat"], settings_of(tied, repulsion=0.5))
