"""What stable commits reach within the allowed loss of quality."""

from tokmat_jax.evaluation.passes import best_within


def point(tokens_per_pass, perplexity):
    return {"tokens_per_pass": tokens_per_pass, "perplexity": perplexity}


def test_the_fastest_whose_perplexity_is_at_most_five_per_cent_higher():
    one, slow, fast, worse = point(1.0, 10.0), point(1.2, 9.0), point(1.4, 10.4), point(2.0, 10.6)
    assert best_within([one, slow, fast, worse]) == fast
    assert best_within([one, worse]) == one


def test_one_token_a_step_stands_where_no_perplexity_is_known():
    one = point(1.0, float("nan"))
    assert best_within([one, point(2.0, float("nan"))]) is one
