import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

import tiny
from tokmat_jax.commands import generate
from tokmat_jax.config import TokenizerConfig
from tokmat_jax.data.tokenizer import make_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.samples import sample_of_moments
from tokmat_jax.storage.workdir import load_config


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


STABLE = {"commit": "stable", "max_commit": 3, "patience": 0, "tolerance": 0.9, "tail_noise": 1.0}


def test_stable_commits_report_their_passes_and_depend_on_nothing_but_the_sample(generator):
    settings = settings_of(generator, **STABLE)
    together = generator.generate(PROMPTS, settings, num_samples=2)
    assert any(one.passes < len(one.tokens) for one in together)
    for sample in together:
        assert len(sample.tokens) / 3 <= sample.passes <= len(sample.tokens) <= 8
        assert len(sample.tokens) == len(sample.entropy) == len(sample.movement)
        moments = list(generator.stream(sample.prompt, settings, sample.number))
        assert moments[-1].tokens == sample.tokens
        assert [moment.committed for moment in moments] == [
            after - before for before, after in itertools.pairwise([0, *(len(one.tokens) for one in moments)])]
        whole = sample_of_moments(generator.tokenizer, sample.prompt, sample.number, moments)
        assert whole.passes == sample.passes == len(moments)


def test_patience_and_tolerance_compile_nothing_and_the_most_at_once_does(generator):
    generator.generate(["the cat"], settings_of(generator, **STABLE))
    count = generator.compilations()
    generator.generate(["the cat"], settings_of(generator, **STABLE | {"patience": 2, "tolerance": 0.3}))
    assert generator.compilations() == count
    generator.generate(["the cat"], settings_of(generator, **STABLE | {"max_commit": 2}))
    assert generator.compilations() == count + 2


def test_plain_samples_take_a_pass_per_token(generator):
    assert all(one.passes == len(one.tokens) for one in generator.generate(PROMPTS))


@pytest.mark.parametrize("controls", [
    {"rate": (0.9, 0.5, 0.4, 0.1)}, {"fresh_noise": 1.0}, {"history_smoothing": 0.5}, {"history_noise": 1.0},
    {"steering": 1.0, "steering_words": ("sea",)},
    {"steering": 1.0, "steering_words": ("sea",), "steering_slots": (0,)},
    {"steering": 2.0, "steering_words": ("sea", "cat"), "steering_schedule": "fade"}])
def test_every_control_changes_samples_and_keeps_them_independent(generator, controls):
    plain, settings = settings_of(generator), settings_of(generator, **controls)
    together = generator.generate(PROMPTS, settings)
    changed = [(one.tokens, one.movement) for one in together]
    assert changed != [(one.tokens, one.movement) for one in generator.generate(PROMPTS, plain)]
    for sample in together:
        [alone] = generator.generate([sample.prompt], settings)
        assert alone.tokens == sample.tokens
        assert list(generator.stream(sample.prompt, settings))[-1].tokens == sample.tokens


def test_strong_steering_says_the_word_and_strong_steering_away_never_does(generator):
    [token] = generator.tokenizer.encode(" sea")
    towards, away = (generator.generate(PROMPTS, settings_of(generator, steering=strength, steering_words=("sea",)))
                     for strength in (30.0, -30.0))
    assert all(set(sample.tokens) == {token} for sample in towards)
    assert not any(token in sample.tokens for sample in away)


def test_a_direction_of_ones_own_is_the_words_where_it_is_their_mean(generator):
    settings = settings_of(generator, steering=0.7, steering_words=("sea", "cat"))
    own = dataclasses.replace(settings, steering_words=())
    direction = 3.0 * generator.direction(["sea", "cat"])
    assert [one.tokens for one in generator.generate(PROMPTS, settings)] == [
        one.tokens for one in generator.generate(PROMPTS, own, direction=direction)]
    with pytest.raises(UserError, match="steering needs a direction"):
        generator.generate(PROMPTS, own)
    for wrong in (np.zeros(16), np.ones(15), np.full(16, np.nan)):
        with pytest.raises(UserError, match="the steering direction must have 16 finite numbers"):
            generator.generate(PROMPTS, own, direction=wrong)
    for factor in (1e-9, 1e20):
        assert [one.tokens for one in generator.generate(PROMPTS, settings)] == [
            one.tokens for one in generator.generate(PROMPTS, own, direction=factor * direction)]
    with pytest.raises(UserError, match="' ' is no word"):
        generator.direction(["sea", " "])


def test_slots_and_schedule_are_those_that_were_asked_for(generator):
    steered = settings_of(generator, steering=2.0, steering_words=("sea",))
    found = {}
    for name, fields in (("all", {}), ("front", {"steering_slots": (0,)}), ("back", {"steering_slots": (3,)}),
                         ("fade", {"steering_schedule": "fade"}), ("rise", {"steering_schedule": "rise"})):
        settings = dataclasses.replace(steered, **fields)
        partial, _ = generator.step(generator.begin("the cat", settings))
        found[name] = partial.slots
    plain = generator.step(generator.begin("the cat"))[0].slots
    # What the first step left in the slots behind the front: slot 3 became slot 2.
    np.testing.assert_allclose(found["front"][:3], plain[:3], atol=1e-6)
    np.testing.assert_allclose(found["back"][:2], plain[:2], atol=1e-6)
    np.testing.assert_allclose(found["back"][2], found["all"][2], atol=1e-6)
    for name in ("fade", "rise"):
        moved, whole = (np.linalg.norm(found[one][:3] - plain[:3], axis=-1) for one in (name, "all"))
        # Slots 1, 2 and 3 of the first step will be tokens 2, 3 and 4 of eight.
        share = np.array([1, 2, 3]) / 7
        np.testing.assert_allclose(moved / whole, share if name == "rise" else 1 - share, rtol=1e-3)


def test_steps_are_the_stream_and_leave_what_they_came_from_as_it_was(generator):
    partial = generator.begin("the cat", number=1, seed=4)
    first, one = generator.step(partial)
    again, other = generator.step(partial)
    assert one == other
    np.testing.assert_array_equal(first.slots, again.slots)
    moments = [one]
    while not first.done:
        first, moment = generator.step(first)
        moments.append(moment)
    assert moments == list(generator.stream("the cat", number=1, seed=4))
    assert first.tokens == tuple(moments[-1].tokens)
    with pytest.raises(UserError, match="the sample is complete"):
        generator.step(first)


def test_a_pinned_text_comes_where_it_is_pinned_and_another_branch_is_free(generator):
    begun = generator.begin("the cat", settings_of(generator, max_new_tokens=8))
    begun, _ = generator.step(begun)
    words = generator.tokenizer.encode(" sea dog")
    held = generator.pin(begun, 2, " sea dog")
    assert held.pins == [None, None, *words, *[None] * (2 - len(words))]
    assert begun.pins == [None] * 4

    def end_of(partial):
        while not partial.done:
            partial, _ = generator.step(partial)
        return list(partial.tokens)

    assert end_of(held)[3 : 3 + len(words)] == words
    assert end_of(begun) == list(generator.stream("the cat", settings_of(generator, max_new_tokens=8)))[-1].tokens


def test_a_pin_changes_what_comes_behind_it_through_the_tail_alone(generator):
    # A slot sees the slots before it: what is held in slot 1 moves slot 2 at once, and slot 0 never.
    begun, _ = generator.step(generator.begin("the cat"))
    row = generator.vocabulary.table[generator.tokenizer.encode(" sea")[0]]
    pinned = generator.pin(begun, 1, " sea")
    np.testing.assert_array_equal(pinned.slots[1], row)
    (free, one), (held, other) = generator.step(begun), generator.step(pinned)
    assert one.tokens == other.tokens
    np.testing.assert_array_equal(held.slots[0], row)
    assert np.abs(held.slots[1] - free.slots[1]).max() > 1e-4


def test_a_replaced_slot_is_free_again(generator):
    words = generator.tokenizer.encode(" sea cat")
    pinned = generator.pin(generator.begin("the cat"), 1, words)
    freed = generator.replace(pinned, 1, words[:1])
    assert freed.pins == [None, None, words[1], None]


def test_a_replaced_slot_holds_what_it_was_given_and_goes_on_to_be_refined(generator):
    begun = generator.begin("the cat")
    [token] = generator.tokenizer.encode(" sea")
    by_text, by_id = generator.replace(begun, 3, " sea"), generator.replace(begun, 3, [token])
    row = np.asarray(generator.vocabulary.table[token])
    by_vector = generator.replace(begun, 3, row)
    for partial in (by_text, by_id, by_vector):
        np.testing.assert_array_equal(partial.slots[3], row)
        np.testing.assert_array_equal(partial.slots[:3], begun.slots[:3])
    after, _ = generator.step(by_text)
    assert np.abs(after.slots[2] - row).max() > 1e-4


@pytest.mark.parametrize(("fields", "says"), [
    ({"steering_words": "sea"}, "steering_words must be a tuple"),
    ({"commit": "stabel"}, "must be one of front, stable"), ({"profile": "flat"}, "must be one of linear"),
    ({"steering_schedule": "up"}, "must be one of constant, fade, rise"),
    ({"rate": [0.1] * 4}, "must be None, a number or a tuple"), ({"patience": 10**11}, "must lie within ±1,000,000"),
])
def test_a_script_with_a_setting_of_the_wrong_kind_is_told(generator, fields, says):
    with pytest.raises(UserError, match=says):
        settings_of(generator, **fields)


SETTINGS = ("tail_length", "max_new_tokens", "guidance_scale", "tail_noise", "rate", "repulsion", "patience",
            "entropy_temperature", "max_maturity", "steering")


@pytest.mark.parametrize(("name", "value"), [
    ("num_samples", 0), ("batch_size", 0), ("batch_size", -3), ("seed", -1), ("seed", 2**32), ("prompt", "\udcff"),
    ("max_new_tokens", 0), ("max_new_tokens", 99), ("max_new_tokens", 10**10), ("tail_length", 0),
    ("guidance_scale", np.nan), ("tail_noise", -np.inf), ("rate", np.nan), ("rate", (0.1, np.nan, 0.1, 0.1)),
    ("entropy_temperature", 0.0), ("max_maturity", 1.5), ("steering", 0.5), ("patience", -1)])
def test_a_script_and_the_command_line_are_refused_the_same(runs_dir, generator, name, value):
    with pytest.raises(UserError) as typed:
        generate.main(["--workdir", str(runs_dir / "run"), *([] if name == "prompt" else ["--prompt", "x"]),
                       f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])])

    def ask(write, *more):
        given = {name: value} if name in ("num_samples", "batch_size", "seed") else {}
        write([value if name == "prompt" else "x"], *more, **given)

    def settings():
        return settings_of(generator, **{name: value} if name in SETTINGS else {})

    ways = [lambda: ask(generator.generate, settings())]
    if name in ("seed", *SETTINGS):
        seed = value if name == "seed" else 0
        ways += [lambda: list(generator.stream("x", settings(), seed=seed)),
                 lambda: generator.record("x", settings(), seed=seed)]
    for way in ways:
        with pytest.raises(UserError) as scripted:
            way()
        assert str(scripted.value) == str(typed.value)


@pytest.mark.parametrize(("change", "says"), [
    (lambda g: g.generate("the cat"), "prompts must be a list of texts, or of lists of ids, found 'the cat'"),
    (lambda g: g.generate([1, 2]), "prompt 1 must be a text, or a list of ids, found 1"),
    (lambda g: g.generate(None), "prompts must be a list"),
    (lambda g: g.generate(["x", [1, 290]]), "prompt 2 has the id 290, the tokenizer has the ids 0..289"),
    (lambda g: next(g.stream([-1])), "prompt 1 has the id -1"),
    (lambda g: g.begin([1.0]), "must be a text, or a list of ids"),
    (lambda g: g.record([[1], [1, 2]]), "must be a text, or a list of ids"),
    (lambda g: g.generate([b"x"]), "must be a text, or a list of ids"),
    (lambda g: g.generate(["x"], num_samples=1.5), "num_samples must be a whole number, found 1.5"),
    (lambda g: g.generate(["x"], num_samples=True), "num_samples must be a whole number, found True"),
    (lambda g: next(g.stream("x", number=-1)), "number must lie in 0..4294967295, found -1"),
    (lambda g: next(g.stream("x", seed="1")), "seed must be a whole number, found '1'"),
    (lambda g: g.generate(["x"], {"tail_length": 2}), "settings must be a GenerationConfig, found"),
    (lambda g: g.record("x", num_candidates=-1), "num_candidates must lie in 0..290, found -1"),
    (lambda g: g.next_tokens([]), "the number of ids must lie in 1..48, found 0"),
    (lambda g: g.direction("sea"), "must be a list of at least one word, found 'sea'"),
    (lambda g: g.direction([]), "must be a list of at least one word"),
    (lambda g: g.generate(["x"], settings_of(g, steering=1.0), direction=[[1.0], [1.0, 2.0]]), "16 finite numbers"),
    (lambda g: settings_of(g, max_new_tokens=3.0), "max_new_tokens must be a whole number, found 3.0"),
    (lambda g: settings_of(g, max_new_tokens=None), "max_new_tokens must be a whole number, found None"),
    (lambda g: settings_of(g, tail_noise="1"), "tail_noise must be a number, found '1'"),
    (lambda g: settings_of(g, tail_noise=np.float32("nan")), "tail_noise must be a finite number, found nan"),
    (lambda g: settings_of(g, steering_slots=(0.5,)), "steering_slots must be whole numbers, found (0.5,)"),
    (lambda g: settings_of(g, steering_words=(5,)), "steering_words must be texts, found (5,)"),
])
def test_what_only_a_script_can_get_wrong_is_told(generator, change, says):
    with pytest.raises(UserError) as caught:
        change(generator)
    assert says in str(caught.value)


def test_numbers_of_numpy_are_numbers(generator):
    own = {"max_new_tokens": 3, "tail_length": 4, "tail_noise": 0.5, "rate": (0.75, 0.5, 0.25, 0.0),
           "steering_slots": (0, 1)}
    numpy = {"max_new_tokens": np.int64(3), "tail_length": np.uint8(4), "tail_noise": np.float32(0.5),
             "rate": tuple(np.array([0.75, 0.5, 0.25, 0.0])), "steering": np.array(0.0),
             "steering_slots": tuple(np.arange(2))}
    want = generator.generate([[1, 2]], settings_of(generator, **own), 2, seed=7, batch_size=2)
    settings = settings_of(generator, **numpy)
    found = generator.generate(np.array([[1, 2]]), settings, np.int32(2), seed=np.int64(7), batch_size=np.uint8(2))
    assert found == want
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["rate"] == [0.75, 0.5, 0.25, 0.0]
    [moment, *_] = generator.stream((np.int64(1), np.int64(2)), settings, np.int64(1), np.uint32(7))
    assert moment.tokens == want[1].tokens[:1]


def test_a_shorter_tail_keeps_what_still_has_a_slot(generator):
    own = settings_of(generator, rate=(0.9, 0.7, 0.5, 0.3), steering=1.0, steering_words=("a",), steering_slots=(0, 3))
    shorter = own.with_tail_length(2)
    assert (shorter.tail_length, shorter.rate, shorter.steering_slots) == (2, (0.9, 0.7), (0,))
    assert dataclasses.replace(own, steering_slots=(3,)).with_tail_length(2).steering == 0.0
    assert own.with_tail_length(4) == own


@pytest.mark.parametrize(("change", "says"), [
    (lambda g, partial: g.pin(partial, 4, " sea"), "slots 0..3, found slots 4..4"),
    (lambda g, partial: g.pin(partial, -1, " sea"), "found slots -1..-1"),
    (lambda g, partial: g.pin(partial, 0, ""), "expected a text that is not empty"),
    (lambda g, partial: g.pin(partial, 0, [9999]), "has the id 9999, the tokenizer has the ids 0..289"),
    (lambda g, partial: g.pin(partial, 0.0, " sea"), "slot must be a whole number, found 0.0"),
    (lambda g, partial: g.pin(partial, 0, "\udcff"), "expected a text that is not empty"),
    (lambda g, partial: g.pin(partial, 0, 5), "must be a text, or a list of ids, found 5"),
    (lambda g, partial: g.replace(partial, 0, [0.5, 0.5]), "must be a text, or a list of ids, found [0.5, 0.5]"),
    (lambda g, partial: g.replace(partial, 0, np.array(["a"] * 16)), "expected finite vectors of 16 numbers"),
    (lambda g, partial: g.record("the", num_candidates=9999), "num_candidates must lie in 0..290, found 9999"),
    (lambda g, partial: g.pin(partial, 2, [1, 2]), "3 tokens are left of the budget, slots 2..3 lie beyond it"),
    (lambda g, partial: g.replace(partial, 3, np.ones((2, 16))), "found slots 3..4"),
    (lambda g, partial: g.replace(partial, 0, np.ones(15)), "expected finite vectors of 16 numbers"),
    (lambda g, partial: g.replace(partial, 0, np.full(16, np.inf)), "expected finite vectors"),
])
def test_an_edit_that_does_not_fit_says_why(generator, change, says):
    partial = generator.begin("the cat", settings_of(generator, max_new_tokens=3))
    with pytest.raises(UserError) as caught:
        change(generator, partial)
    assert says in str(caught.value)


def test_a_batch_is_spread_over_the_devices_and_gives_the_same_samples(runs_dir):
    whole = Generator.from_workdir(runs_dir / "run")
    settings = settings_of(whole, max_new_tokens=8)
    prompts = ["the cat", "a dog ran", "who", "the sea is"]
    state, _ = whole._start(whole.rows(prompts, settings), settings, 0, None)
    assert len(jax.devices()) == 4
    for array in (state.tail, state.memory[0].key, state.memory[1].value):
        assert len(array.sharding.device_set) == 4
        assert array.addressable_shards[0].data.shape[0] == 1
    spread = whole.generate(prompts, settings)
    # Rows that the devices do not divide stay on one, and so do those of a process with one device.
    assert [whole.generate([prompt], settings)[0].tokens for prompt in prompts] == [one.tokens for one in spread]


def test_what_was_trained_with_another_kernel_is_written_on_any_machine(runs_dir):
    config = load_config(runs_dir / "run")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"),
                                 compute=dataclasses.replace(config.compute, attention="cudnn"))
    one = Generator.from_workdir(runs_dir / "run")
    with jax.numpy_dtype_promotion("standard"):
        written = Generator(config, one.params, one.tokenizer).generate(["the cat"])
    assert written[0].tokens


def test_a_day_of_mixed_prompts_compiles_its_buckets_once(runs_dir):
    generator = Generator.from_workdir(runs_dir / "run")
    rng = np.random.default_rng(0)

    def request():
        prompts = [rng.integers(1, 200, rng.integers(1, 33)).tolist() for _ in range(rng.integers(1, 9))]
        settings = settings_of(generator, max_new_tokens=int(rng.integers(1, 9)),
                               guidance_scale=float(rng.uniform(1.5, 3.0)), tail_noise=float(rng.uniform(0.0, 1.0)))
        return prompts, settings, int(rng.integers(0, 100))

    # Batches of 1, 2, 4 and 8; prompts of up to 16 and 32 (and 48, the model's positions); scans of 4 and 8 steps.
    for size, length, new in itertools.product((1, 2, 4, 8), (16, 32), (4, 8)):
        generator.generate([[1] * length] * size, settings_of(generator, max_new_tokens=new, guidance_scale=2.0))
    warm = generator.compilations()
    assert warm <= 8 + 16
    for _ in range(40):
        prompts, settings, seed = request()
        generator.generate(prompts, settings, seed=seed)
    assert generator.compilations() == warm
