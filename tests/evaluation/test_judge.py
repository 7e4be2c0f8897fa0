"""The judge against a forward pass per sequence, and what it does where positions or tokens do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.errors import UserError
from tokmat_jax.evaluation.judge import Judge, Reading, perplexity
from tokmat_jax.generation.generator import Generator
from tokmat_jax.model.backbone import make_forward

POSITIONS = 48
RNG = np.random.default_rng(0)


def some_ids(count):
    return RNG.integers(1, 290, count).tolist()


# Lengths 1, 3, 12, 40 and 48 in two buckets (32, 48); several are the same, so that few shapes are compiled.
PAIRS = [
    (some_ids(10), some_ids(30)),
    (some_ids(2), some_ids(1)),
    ([], some_ids(11)),
    (some_ids(12), []),
    (some_ids(47), some_ids(1)),
    (some_ids(1), some_ids(47)),
    (some_ids(3), some_ids(9)),
    ([], []),
]


@pytest.fixture(scope="module")
def judge(runs_dir):
    return Judge(Generator.from_workdir(runs_dir / "ar"))


@pytest.fixture(scope="module")
def naive(judge):
    """(prompt, continuation) → nats, entropy and ending, with nothing clever."""
    generator = judge.generator
    forward = jax.jit(make_forward(generator.config))
    table = np.asarray(generator.vocabulary.table, np.float64)
    radius = generator.config.table.radius

    def read(prompt, new):
        before = list(prompt) or [judge.tokenizer.end_of_text]
        ids = [*before, *new]
        z = jnp.asarray(table[ids], jnp.float32)[None]
        output, _ = forward(generator.backbone, z, jnp.ones((1, len(ids))), jnp.zeros((1,), jnp.int32),
                            jnp.arange(len(ids))[None])
        output = np.asarray(output[0], np.float64)
        nats, entropy = [], []
        for place in range(len(before), len(ids)):
            z = output[place - 1]
            logits = generator.config.objective.logit_scale * (table @ z) / radius**2
            nats.append(-(logits - np.logaddexp.reduce(logits))[ids[place]])
            cosine = table @ z / np.linalg.norm(table, axis=1) / np.linalg.norm(z)
            log_p = cosine - np.logaddexp.reduce(cosine)
            entropy.append(-np.sum(np.exp(log_p) * log_p))
        return Reading(np.array(nats), np.array(entropy), output[-1])

    return read


def assert_same(got, want):
    # float32 sums of 290 terms of size ≤ 20: errors of a few 10⁻⁶ of a logit.
    assert got.nats.shape == want.nats.shape
    np.testing.assert_allclose(got.nats, want.nats, atol=5e-5)
    np.testing.assert_allclose(got.entropy, want.entropy, atol=5e-5)
    np.testing.assert_allclose(got.ending, want.ending, atol=1e-5)


def test_every_pair_is_read_as_by_a_forward_pass_of_its_own(judge, naive):
    for got, pair in zip(judge.read_ids(PAIRS), PAIRS, strict=True):
        assert_same(got, naive(*pair))
        assert len(got.nats) == len(got.entropy) == len(pair[1])


def test_the_model_is_one_that_does_not_find_everything_as_likely(judge):
    # Otherwise the comparison above would hold for a judge that reads the wrong place.
    nats = judge.read_ids(PAIRS[:1])[0].nats
    assert nats.max() - nats.min() > 0.5


def test_neither_order_nor_neighbours_change_a_reading(judge):
    together = judge.read_ids(PAIRS)
    for got, want in zip(judge.read_ids(PAIRS[::-1]), together[::-1], strict=True):
        assert_same(got, want)
    for pair, want in zip(PAIRS[:4], together[:4], strict=True):
        assert_same(judge.read_ids([pair])[0], want)


def test_more_pairs_than_one_batch_holds_come_back_in_their_order(judge):
    pairs = [([1 + index], [2 + index, 3]) for index in range(70)]
    found = judge.read_ids(pairs)
    assert len(found) == 70
    for index in (0, 63, 64, 69):
        assert_same(found[index], judge.read_ids([pairs[index]])[0])


def test_no_pairs_are_no_readings(judge):
    assert judge.read_ids([]) == []


def test_the_ending_is_the_prediction_behind_the_last_token(judge):
    prompt, new = PAIRS[6]
    ending = judge.read_ids([(prompt, new)])[0].ending
    moved = [*new[:-1], new[-1] % 289 + 1]
    assert np.abs(judge.read_ids([(prompt, moved)])[0].ending - ending).max() > 1e-3
    # One split of the same ids is as good as another, and its nearest token is the baseline's next one.
    assert_same(Reading(np.zeros(0), np.zeros(0), judge.read_ids([([*prompt, *new], [])])[0].ending),
                Reading(np.zeros(0), np.zeros(0), ending))
    nearest = int(np.argmax(np.asarray(judge.generator.vocabulary.readout) @ ending))
    assert nearest == judge.generator.next_tokens([*prompt, *new])[-1]


def test_a_prompt_that_is_too_long_loses_its_beginning_only(judge):
    prompt, new = some_ids(60), some_ids(20)
    [got] = judge.read_ids([(prompt, new)])
    assert_same(got, judge.read_ids([(prompt[-(POSITIONS - 20) :], new)])[0])
    shorter = judge.read_ids([(prompt[-(POSITIONS - 21) :], new)])[0]
    assert np.abs(shorter.nats - got.nats).max() > 1e-4


def test_a_continuation_that_is_too_long_is_refused_with_the_numbers(judge):
    # 48 positions: 47 tokens and one before them.
    assert judge.read_ids([(some_ids(60), some_ids(47))])[0].nats.size == 47
    with pytest.raises(UserError, match="the judge has 48 positions, a continuation has 48 of its tokens"):
        judge.read_ids([([], some_ids(3)), ([1], some_ids(48))])


@pytest.mark.parametrize("new", [" sat on the mat", "", " é"])
def test_text_is_read_as_its_ids_where_the_split_falls_between_tokens(judge, new):
    encode = judge.tokenizer.encode
    assert encode("the cat" + new) == encode("the cat") + encode(new)
    assert_same(judge.read_texts([("the cat", new)])[0], judge.read_ids([(encode("the cat"), encode(new))])[0])


def test_a_token_that_straddles_counts_for_the_continuation(judge):
    encode, piece = judge.tokenizer.encode, judge.tokenizer.piece
    ids = encode("the cat sat")
    assert [piece(token) for token in ids[-2:]] == [" cat", " sat"]
    # "the cat s|at": " sat" is one token and ends behind the split.
    assert_same(judge.read_texts([("the cat s", "at")])[0], judge.read_ids([(ids[:-1], ids[-1:])])[0])
    # "the|…" with nothing before it: the judge's own beginning stands in front.
    assert_same(judge.read_texts([("", "the cat sat")])[0], judge.read_ids([([], ids)])[0])


def test_a_maturation_run_is_no_judge(runs_dir):
    with pytest.raises(UserError, match=r"run cannot judge: it is a maturation run"):
        Judge(Generator.from_workdir(runs_dir / "run"))


def test_perplexity_is_over_tokens_not_over_texts():
    def reading(*nats):
        return Reading(np.array(nats), np.zeros(len(nats)), np.zeros(2))

    # Five tokens cost 1 + 3 + 3 + 3 + 5 = 15 nats: e³, while the texts' own means are 1 and 3.5.
    assert perplexity([reading(1.0), reading(3.0, 3.0, 3.0, 5.0)]) == pytest.approx(np.exp(3.0))
    assert np.isnan(perplexity([reading(), reading()]))


def test_a_prompt_that_begins_with_the_judges_prefix_gets_no_second_one(runs_dir):
    judge = Judge(Generator.from_workdir(runs_dir / "ar"))
    judge.tokenizer.prefix = (7, 8)
    bare, begun = judge.read_ids([([30, 40], [50, 60]), ([7, 8, 30, 40], [50, 60])])
    assert_same(bare, begun)
    judge.tokenizer.prefix = ()
    assert_same(judge.read_ids([([7, 8, 30, 40], [50, 60])])[0], bare)
