"""The article's figures as data, where a table began, sentences in another order, and parts that are kept."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from tokmat_jax.config import MeshConfig
from tokmat_jax.distributed.mesh import make_mesh
from tokmat_jax.evaluation import figures
from tokmat_jax.evaluation.article import starting_table
from tokmat_jax.evaluation.card import shuffle_sentences
from tokmat_jax.evaluation.store import Store
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.trajectory import Trajectory
from tokmat_jax.model.params import vocabulary_of
from tokmat_jax.training.step import make_train_functions


def letter(token):
    return chr(ord("a") + token)


def letters(tokens):
    return "".join(letter(token) for token in tokens)


def trajectory(tokens, entropy=None):
    """A trajectory by hand: its nearest tokens [N, K], and numbers that tell every entry from every other."""
    tokens = np.array(tokens)
    numbers = np.arange(tokens.size, dtype=float).reshape(tokens.shape) if entropy is None else np.array(entropy)
    candidates = np.stack([tokens, tokens + 1], axis=-1)
    steps, slots = tokens.shape
    return Trajectory(np.array([0]), 0.9 * (1 - np.arange(slots) / slots), np.ones(steps, int), tokens, numbers,
                      numbers / 10, candidates, np.stack([numbers, -numbers], axis=-1), np.zeros((steps, slots, 0)))


# Five steps of a tail of three, front first. Token i was slot 2 at step i − 2, slot 1 at i − 1 and the front at i, so
# the paths are those of tokens 2, 3 and 4: 7 5 2, 3 3 3 and 9 4 4, which change twice, never and once.
SOFT = trajectory([[0, 1, 7], [1, 5, 3], [2, 3, 9], [3, 4, 0], [4, 0, 0]])


def test_the_tokens_shown_are_those_that_changed_most():
    found = figures.maturing(SOFT, SOFT, letter, num_tokens=2)
    assert [(one["index"], one["token"], one["changes"]) for one in found["tokens"]] == [(2, "c", 2), (4, "e", 1)]
    assert (found["tail_length"], found["num_tokens"], found["mean_changes"]) == (3, 3, 1.0)
    first = found["tokens"][0]
    # Entries (0, 2), (1, 1) and (2, 0) of three columns, numbered by rows.
    assert first["entropy"] == [2.0, 4.0, 6.0]
    assert first["movement"] == pytest.approx([0.2, 0.4, 0.6])
    assert first["candidates"] == [["h", "i"], ["f", "g"], ["c", "d"]]
    assert first["cosines"] == [[2.0, -2.0], [4.0, -4.0], [6.0, -6.0]]


def test_of_equally_restless_tokens_the_first_are_shown():
    same = trajectory([[0, 0, 0]] * 6)
    assert [one["index"] for one in figures.maturing(same, same, letter, num_tokens=3)["tokens"]] == [2, 3, 4]


def test_means_are_by_refinement_over_all_tokens_with_a_whole_tail():
    sharp = trajectory(SOFT.tokens, 100.0 + np.array(SOFT.entropy))
    found = figures.maturing(sharp, SOFT, letter)
    # Entries of the three paths: 2 4 6, 5 7 9 and 8 10 12.
    assert found["entropy"]["mean"] == [5.0, 7.0, 9.0]
    assert found["sharp_entropy"]["mean"] == [105.0, 107.0, 109.0]
    assert found["entropy"]["std"] == pytest.approx([np.sqrt(6.0)] * 3)
    assert found["movement"]["mean"] == pytest.approx([0.5, 0.7, 0.9])
    assert found["tokens"][0]["sharp_entropy"] == [102.0, 104.0, 106.0]


def test_a_sample_shorter_than_its_tail_has_nothing_to_show():
    short = trajectory([[0, 1, 2], [1, 2, 3]])
    found = figures.maturing(short, short, letter)
    assert (found["tokens"], found["num_tokens"], found["mean_changes"]) == ([], 0, 0.0)
    assert found["entropy"] == {"mean": [], "std": []}


def test_the_readout_is_spread_from_the_first_step_to_the_last():
    found = figures.readout(SOFT, letters, letter, num_moments=3)
    assert found == [
        {"step": 1, "text": "a", "tail": ["b", "h"]},
        {"step": 3, "text": "abc", "tail": ["d", "j"]},
        {"step": 5, "text": "abcde", "tail": ["a", "a"]},
    ]
    assert [one["step"] for one in figures.readout(SOFT, letters, letter, num_moments=99)] == [1, 2, 3, 4, 5]


def test_what_a_tail_foresees_by_hand_and_by_chance():
    # 34 tokens: two steps have 32 behind them. Of the first sample's tails, 5 comes at step 33, outside the window of
    # the first step (1..32) and inside that of the second (2..33); 9 never comes; 1 comes all the time.
    first = np.ones((34, 3), int)
    first[33, 0] = 5
    first[0, 1:], first[1, 1:] = (5, 1), (5, 9)
    # The second sample says 9 only, and its tails foresee it; step 2's slots are not looked at.
    second = np.full((34, 3), 9)
    found = figures.lookahead([trajectory(first), trajectory(second)])
    # Hits: (5 no, 1 yes), (5 yes, 9 no), and all four of the second.
    assert found["share"] == 6 / 8
    # Beside the other's text: 5 1 5 9 against nines, 9 9 9 9 against ones and the five.
    assert found["chance"] == 1 / 8


def test_the_longer_sample_is_cut_for_chance_alone():
    longer, shorter = np.full((40, 2), 3), np.full((33, 2), 4)
    found = figures.lookahead([trajectory(longer), trajectory(shorter)])
    assert found == {"share": 1.0, "chance": 0.0}


@pytest.mark.parametrize("tokens", [np.zeros((32, 3), int), np.zeros((40, 1), int)], ids=["short", "no tail"])
def test_where_there_is_nothing_to_foresee_it_is_not_a_number(tokens):
    found = figures.lookahead([trajectory(tokens)] * 2)
    assert np.isnan(found["share"])
    assert np.isnan(found["chance"])


@pytest.fixture(scope="module")
def run(runs_dir):
    return Generator.from_workdir(runs_dir / "run")


def test_diversity_of_each_tail_is_that_of_its_samples(run):
    settings = dataclasses.replace(run.config.generation, tail_noise=3.0, max_maturity=0.3)
    found = figures.diversity_by_tail(run, "the cat", settings, [2, 4], num_seeds=4, seed=0, batch_size=4)
    assert [one["tail_length"] for one in found] == [2, 4]
    for one in found:
        own = dataclasses.replace(settings, tail_length=one["tail_length"])
        tokens = [sample.tokens for sample in run.generate(["the cat"], own, 4, batch_size=4)]
        pairs = [list(itertools.pairwise(sample)) for sample in tokens]
        everything = list(itertools.chain(*pairs))
        assert one["within"] == pytest.approx(np.mean([len(set(of_one)) / len(of_one) for of_one in pairs]))
        assert one["between"] == pytest.approx(len(set(everything)) / len(everything))
        assert one["different"] == len({tuple(sample) for sample in tokens}) / 4


def test_samples_without_noise_differ_in_nothing(run):
    settings = dataclasses.replace(run.config.generation, tail_noise=0.0)
    [found] = figures.diversity_by_tail(run, "the cat", settings, [4], num_seeds=4, seed=0, batch_size=4)
    assert found["different"] == 1 / 4
    assert found["between"] == pytest.approx(found["within"] / 4)


def test_attractors_mark_what_most_samples_share_in_place():
    found = figures.attractors([[0, 1, 2], [0, 3, 2], [0, 2]], letter, shown=2)
    # The column in the middle has b, d and a gap: nobody has half of it.
    assert found["rows"] == [[["a", True], ["b", False], ["c", True]], [["a", True], ["d", False], ["c", True]]]
    assert (found["template"], found["num_samples"]) == ("ac", 3)
    assert found["stability"] == 6 / 8


def test_attractors_of_a_run_hold_its_samples(run):
    samples = [sample.tokens for sample in run.generate(["the cat"], num_samples=4, batch_size=4)]
    found = figures.attractors(samples, run.tokenizer.piece)
    assert [[piece for piece, _ in row] for row in found["rows"]] == [
        [run.tokenizer.piece(token) for token in sample] for sample in samples]
    assert 0 <= found["chance"] <= 1
    assert 0 <= found["stability"] <= 1


def test_a_turned_table_has_drifted_and_has_the_same_geometry():
    table = np.random.default_rng(0).normal(size=(40, 6))
    turn = np.eye(6)
    turn[:2, :2] = [[0.6, -0.8], [0.8, 0.6]]
    found = figures.table_geometry(table, table @ turn)
    assert (found["nearest_changed"], found["nearest_10_changed"]) == (0.0, 0.0)
    assert found["after"] == pytest.approx(found["before"])
    # By the angle that the plane of the first two coordinates turns, less for what lies outside of it.
    whole = np.degrees(np.arccos(0.6))
    drift = found["drift_degrees"]
    assert 0 < drift["p10"] < drift["mean"] < drift["p90"] < whole
    still = figures.table_geometry(table, 3.0 * table)
    assert still["drift_degrees"]["mean"] == pytest.approx(0.0, abs=1e-5)


# Where a table began


def vectors_of(rows, config):
    return np.asarray(vocabulary_of({"table": jax.numpy.asarray(rows)}, config).table)


def other_config(generator, params=None, **changes):
    return Generator(dataclasses.replace(generator.config, **changes), generator.params if params is None else params,
                     generator.tokenizer)


def test_a_fresh_runs_first_table_is_what_training_begins_with(run):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        functions = make_train_functions(run.config, run.tokenizer.vocab_size, mesh)
        params = jax.device_get(functions.init(jax.random.key(run.config.train.seed)).params)
    found = starting_table(run)
    assert found is not None
    np.testing.assert_allclose(found, vectors_of(params["table"], run.config), atol=1e-6)
    # Six steps have moved it, another seed begins elsewhere.
    assert np.abs(found - np.asarray(run.vocabulary.table)).max() > 1e-3
    seed = dataclasses.replace(run.config.train, seed=1)
    assert np.abs(found - starting_table(other_config(run, train=seed))).max() > 0.1


def test_an_initial_table_stands_on_the_sphere_as_in_training(run, tmp_path):
    rows = 7.0 * np.random.default_rng(0).normal(size=run.vocabulary.table.shape)
    np.save(tmp_path / "rows.npy", rows)
    config = dataclasses.replace(run.config.table, initial=str(tmp_path / "rows.npy"), radius=2.0)
    found = starting_table(other_config(run, table=config))
    np.testing.assert_allclose(found, 2.0 * rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-5)
    for content in (b"", b"no array"):
        (tmp_path / "rows.npy").write_bytes(content)
        assert starting_table(other_config(run, table=config)) is None
    np.save(tmp_path / "rows.npy", rows[1:])
    assert starting_table(other_config(run, table=config)) is None
    (tmp_path / "rows.npy").unlink()
    assert starting_table(other_config(run, table=config)) is None


def test_a_run_that_began_with_a_model_has_its_table(run, runs_dir, tmp_path):
    source = Generator.from_workdir(runs_dir / "ar")
    longer = dataclasses.replace(run.config.table, radius=3.0)
    found = starting_table(other_config(run, init_from=str(runs_dir / "ar"), table=longer))
    np.testing.assert_allclose(found, 3.0 * np.asarray(source.vocabulary.table), atol=1e-5)
    assert starting_table(other_config(run, init_from=str(tmp_path / "nowhere"))) is None
    # A folder that holds no run any more.
    assert starting_table(other_config(run, init_from=str(tmp_path))) is None
    copy = shutil.copytree(runs_dir / "ar", tmp_path / "ar")
    shutil.rmtree(copy / "checkpoints")
    assert starting_table(other_config(run, init_from=str(copy))) is None


# Sentences in another order

TEXT = "  and he said. Who sat by\nthe sea?\n   The dog ran!\n\nA cat"


def test_sentences_stay_whole_and_white_space_stays_in_its_place():
    sentences = {"and he said.", "Who sat by\nthe sea?", "The dog ran!", "A cat"}
    orders = set()
    for seed in range(20):
        rest = shuffle_sentences(TEXT, seed)
        assert rest.startswith("  ")
        found = []
        for space in (" ", "\n   ", "\n\n"):
            rest = rest.lstrip(" ") if not found else rest
            one = next(sentence for sentence in sentences if rest.startswith(sentence + space))
            found.append(one)
            rest = rest[len(one + space) :]
        assert {*found, rest} == sentences
        orders.add((*found, rest))
        assert shuffle_sentences(TEXT, seed) == shuffle_sentences(TEXT, seed)
    assert len(orders) > 10


@pytest.mark.parametrize("text", ["", " ", "\n\n", "no end", " one sentence.\n", "3.14 is no end. "])
def test_text_of_one_sentence_stays_as_it_is(text):
    assert shuffle_sentences(text, 3) == text


# Parts that are kept


class Maker:
    """Counts how often it was asked."""

    def __init__(self, part):
        self.part, self.count = part, 0

    def __call__(self):
        self.count += 1
        return self.part


PART = {"numbers": [1, 2.5, None], "text": "é"}


def test_a_part_is_made_once(tmp_path):
    make = Maker(PART)
    store = Store(tmp_path / "parts", {"step": 6})
    assert store.get("greedy", [1], make) == PART
    assert not store.reused
    assert store.get("greedy", [1], make) == PART
    later = Store(tmp_path / "parts", {"step": 6})
    assert later.get("greedy", [1], make) == PART
    assert later.reused
    assert make.count == 1


def test_what_comes_back_is_the_same_the_first_time(tmp_path):
    make = Maker({"pair": (1, 2), "none": float("nan")})
    first = Store(tmp_path, {}).get("p", None, make)
    again = Store(tmp_path, {}).get("p", None, make)
    assert first["pair"] == again["pair"] == [1, 2]
    assert np.isnan(first["none"])
    assert np.isnan(again["none"])


@pytest.mark.parametrize(
    ("origin", "name", "settings"),
    [({"step": 7}, "greedy", {"s": 1}), ({"step": 6, "seed": 0}, "greedy", {"s": 1}), ({"step": 6}, "other", {"s": 1}),
     ({"step": 6}, "greedy", {"s": 2}), ({"step": 6}, "greedy", {}), ({"step": 6}, "greedy", None)],
)
def test_another_origin_name_or_setting_makes_it_again(tmp_path, origin, name, settings):
    make = Maker(PART)
    Store(tmp_path, {"step": 6}).get("greedy", {"s": 1}, make)
    other = Store(tmp_path, origin)
    other.get(name, settings, make)
    assert make.count == 2
    assert not other.reused
    # Neither takes the other's place.
    Store(tmp_path, {"step": 6}).get("greedy", {"s": 1}, make)
    Store(tmp_path, origin).get(name, settings, make)
    assert make.count == 2


@pytest.mark.parametrize("content", [b"", b'{"part": {"numb', b"[1, 2]", b"{}", b"\xff\xfe"])
def test_a_damaged_part_is_made_again(tmp_path, content):
    make = Maker(PART)
    Store(tmp_path, {}).get("greedy", 1, make)
    [path] = tmp_path.glob("*.json")
    path.write_bytes(content)
    store = Store(tmp_path, {})
    assert store.get("greedy", 1, make) == PART
    assert make.count == 2
    assert not store.reused
    assert json.loads(path.read_text())["part"] == PART


def test_a_part_that_failed_leaves_nothing(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, {}).get("greedy", 1, fail)
    assert list(tmp_path.iterdir()) == []
    assert Store(tmp_path, {}).get("greedy", 1, Maker(PART)) == PART
