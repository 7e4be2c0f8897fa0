"""What stable commits reach within the allowed loss of quality, and what verified commits gain."""

import dataclasses

import pytest

from tokmat_jax.config import GenerationConfig
from tokmat_jax.evaluation.passes import best_within, timed, verified_cases
from tokmat_jax.generation.generator import Generator


def point(tokens_per_pass, perplexity):
    return {"tokens_per_pass": tokens_per_pass, "perplexity": perplexity}


def test_the_fastest_whose_perplexity_is_at_most_five_per_cent_higher():
    one, slow, fast, worse = point(1.0, 10.0), point(1.2, 9.0), point(1.4, 10.4), point(2.0, 10.6)
    assert best_within([one, slow, fast, worse]) == fast
    assert best_within([one, worse]) == one


def test_one_token_a_step_stands_where_no_perplexity_is_known():
    one = point(1.0, float("nan"))
    assert best_within([one, point(2.0, float("nan"))]) is one


def test_the_cases_differ_in_their_drafts_and_the_reference_is_told_the_same_tail():
    base = GenerationConfig(tail_length=3, rate=0.7, repulsion=0.4, steering=0.2, steering_slots=(0, 2))
    cases = verified_cases(base, (1, 2, 3))
    assert list(cases) == ["reference", "one a pass", *(f"{draft}, M {count}" for draft in ("tail", "lookup", "both")
                                                        for count in (1, 2))]
    reference = cases["reference"]
    assert (reference.tail_length, reference.rate, reference.model_tail_length) == (1, 1.0, 3)
    assert (reference.repulsion, reference.steering_slots, reference.commit) == (0.4, (0,), "front")
    assert cases["both, M 2"] == dataclasses.replace(base, commit="verified", draft="both", max_commit=3)


def test_what_is_measured_of_verified_commits_adds_up(runs_dir):
    run = Generator.from_workdir(runs_dir / "run")
    base = dataclasses.replace(run.settings, max_new_tokens=8)
    for name, settings in verified_cases(base, (2,)).items():
        found = timed(run, [[5, 6, 7], [8]], settings, 2)
        # Every accepted draft is a token more than one a pass.
        assert found["tokens_per_pass"] == pytest.approx(1.0 + sum(found["accepted"]))
        assert len(found["accepted"]) == (2 if settings.commit == "verified" else 0), name
        assert found["tokens_per_second"] > found["passes_per_second"] * 0.999
