import contextlib
import dataclasses

import numpy as np
import pytest

from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.samples import sample_of_trajectory
from tokmat_jax.generation.trajectory import Trajectory, load_trajectory


def test_a_recording_is_the_same_sample_with_all_of_its_tail(runs_dir):
    generator = Generator.from_workdir(runs_dir / "run")
    settings = dataclasses.replace(generator.config.generation, tail_noise=1.0)
    found = generator.record("the cat", settings, number=1, seed=3, num_candidates=5)
    moments = list(generator.stream("the cat", settings, number=1, seed=3))
    assert found.tokens[:, 0].tolist() == moments[-1].tokens
    for moment, tokens, entropy, movement in zip(moments, found.tokens, found.entropy, found.movement, strict=True):
        assert moment.tail == tokens[1:].tolist()
        np.testing.assert_allclose(moment.entropy, entropy, rtol=1e-5)
        np.testing.assert_allclose(moment.movement, movement, rtol=1e-4)
    assert found.candidates.shape == (len(moments), 4, 5)
    np.testing.assert_array_equal(found.candidates[..., 0], found.tokens)
    assert (np.diff(found.cosines, axis=-1) <= 1e-6).all()
    assert (np.abs(found.cosines) <= 1 + 1e-5).all()


def made_by_hand():
    # Token 10 n + j is what slot j says at step n.
    tokens = np.array([[10 * n + j for j in range(3)] for n in range(4)])
    return Trajectory(np.array([7]), np.array([0.9, 0.6, 0.3]), np.ones(4, int), tokens, 0.1 * tokens, 0.2 * tokens,
                      tokens[..., None], 1.0 * tokens[..., None], np.zeros((4, 3, 0)))


def test_a_token_is_followed_from_its_slot_of_birth_to_the_front():
    found = made_by_hand()
    assert found.tokens[found.of_token(3)].tolist() == [12, 21, 30]
    assert found.tokens[found.of_token(1)].tolist() == [1, 10]
    assert found.tokens[found.of_token(0)].tolist() == [0]


def test_a_token_that_came_with_others_at_once_is_followed_too():
    # The second step commits three tokens: slot 0 of the third step is token 4 of the text.
    found = dataclasses.replace(made_by_hand(), committed=np.array([1, 3, 1, 1]))
    assert found.text.tolist() == [0, 10, 11, 12, 20, 30]
    assert found.before.tolist() == [0, 1, 4, 5]
    assert found.tokens[found.of_token(3)].tolist() == [12]
    assert found.tokens[found.of_token(2)].tolist() == [2, 11]
    assert found.tokens[found.of_token(5)].tolist() == [21, 30]


def test_a_recording_of_stable_commits_is_the_same_sample_and_keeps_vectors_where_asked(runs_dir):
    generator = Generator.from_workdir(runs_dir / "run")
    settings = dataclasses.replace(generator.config.generation, tail_noise=1.0, commit="stable", patience=0,
                                   tolerance=0.9)
    found = generator.record("the cat", settings, num_candidates=3, keep_vectors=True)
    [sample] = generator.generate(["the cat"], settings)
    assert found.text.tolist() == sample.tokens
    assert len(found.committed) == sample.passes
    assert sample_of_trajectory(generator.tokenizer, "the cat", 0, found).tokens == sample.tokens
    assert found.prompt.tolist() == generator.tokenizer.encode("the cat")
    assert found.vectors.shape == (sample.passes, 4, 16)
    nearest = np.argmax(found.vectors @ np.asarray(generator.vocabulary.table).T, axis=-1)
    np.testing.assert_array_equal(nearest, found.tokens)
    # Whatever is recorded, no array is as long as the vocabulary.
    assert all(generator.tokenizer.vocab_size not in array.shape for array in dataclasses.asdict(found).values())


def test_saved_and_read_again_it_is_the_same_and_damage_is_named(tmp_path):
    made_by_hand().save(tmp_path / "t.npz")
    for name, array in dataclasses.asdict(made_by_hand()).items():
        np.testing.assert_array_equal(getattr(load_trajectory(tmp_path / "t.npz"), name), array)
    whole = (tmp_path / "t.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros(3))
    dataclasses.replace(made_by_hand(), entropy=np.zeros((4, 2))).save(tmp_path / "other.npz")
    for name in ("half.npz", "none.npz", "empty.npz", "array.npy", "other.npz"):
        with pytest.raises(UserError, match="is no trajectory"):
            load_trajectory(tmp_path / name)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with contextlib.suppress(UserError):
            load_trajectory(tmp_path / "damaged.npz")
