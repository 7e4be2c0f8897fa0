import itertools

from hypothesis import given
from hypothesis import strategies as st

from loading import Source, taken
from tokmat_jax.data import loader


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    seen = flat(taken(loader.train_batches(Source(12), 3, seed=0), 8))
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]
    assert seen != flat(taken(loader.train_batches(Source(12), 3, seed=1), 8))


@given(st.integers(1, 4), st.integers(1, 3))
def test_processes_read_the_rows_of_one_batch(count, each):
    size = count * each
    whole = taken(loader.train_batches(Source(11), size, seed=0), 5)
    parts = [taken(loader.train_batches(Source(11), size, 0, slice(index * each, (index + 1) * each)), 5)
             for index in range(count)]
    assert [flat(rows) for rows in zip(*parts, strict=True)] == whole


@given(st.integers(0, 7), st.integers(1, 5), st.integers(0, 9))
def test_a_saved_position_continues_exactly(before, batch_size, elsewhere):
    one = loader.train_batches(Source(7), batch_size, seed=3)
    taken(one, before)
    position = one.position
    assert position == before
    want = taken(one, 5)
    other = loader.train_batches(Source(7), batch_size, seed=3)
    taken(other, elsewhere)
    other.seek(position)
    assert taken(other, 5) == want


def test_validation_reads_in_order_and_starts_over():
    got = [batch[:, 0].tolist() for batch in loader.validation_batches(Source(5), 2, 3)]
    assert got == [[0, 1], [2, 3], [4, 0]]
