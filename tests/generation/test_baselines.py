"""Ordinary decoding against `transformers`, against the naive full forward, and against its own equations."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from tokmat_jax.config import ObjectiveConfig, TokenizerConfig
from tokmat_jax.data.tokenizer import make_tokenizer, train_bpe
from tokmat_jax.errors import UserError
from tokmat_jax.generation.baselines import Baselines
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.sampling import Sampling, choose, nucleus, penalise
from tokmat_jax.hf.convert import import_weights
from tokmat_jax.model.backbone import make_forward

VOCAB = 257
CONFIG = dataclasses.replace(
    tiny.CONFIG, data=dataclasses.replace(tiny.CONFIG.data, seq_len=96),
    objective=ObjectiveConfig(kind="ar", logit_scale=12.0))
PROMPTS = ["the cat", "", "a dog ran to the sea. the", "who", "who sat by"]
"""Two widths of the prompts' bucket, so that a batch mixes them."""
NEW = 20


def new_generator(config=CONFIG):
    return Generator(config, tiny.shaken_params(config, VOCAB), make_tokenizer(TokenizerConfig(kind="bytes"), []))


@functools.cache
def shaken():
    """(generator, decoder) of a baseline in which nothing is zero."""
    generator = new_generator()
    return generator, Baselines(generator)


def ids_of(prompt):
    generator, _ = shaken()
    return generator.rows([prompt], dataclasses.replace(CONFIG.generation, max_new_tokens=1))[0].ids


def outputs(ids):
    """ẑ [n, d] of the whole sequence, run again from its beginning."""
    generator, _ = shaken()
    padded = np.zeros((1, CONFIG.max_positions), np.int32)
    padded[0, : len(ids)] = ids
    prediction = whole_forward()(generator.backbone, generator.vocabulary.table, padded)
    return np.asarray(prediction[0, : len(ids)], np.float64)


@functools.cache
def whole_forward():
    forward, length = make_forward(CONFIG), CONFIG.max_positions

    @jax.jit
    def predict(params, table, ids):
        told, positions = jnp.zeros((1,), jnp.int32), jnp.arange(length)[None]
        return forward(params, table[ids], jnp.ones((1, length)), told, positions)[0]

    return predict


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits_after(prediction):
    """[n, V] of predictions [n, d]."""
    generator, _ = shaken()
    return float(generator.logit_scale) * prediction @ np.asarray(generator.vocabulary.readout).T


def log_probs_after(prediction):
    """log p [n, V] that predictions [n, d] give, in nats."""
    return log_softmax(logits_after(prediction))


def penalised(ids, penalty):
    """Logits [V] behind `ids`, with those of its own tokens penalised."""
    logits = logits_after(outputs(ids)[-1])
    for token in set(ids):
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    return logits


def naive_log_probs(prompt, tokens):
    ids = ids_of(prompt) + tokens
    whole = log_probs_after(outputs(ids))
    begin = len(ids) - len(tokens)
    return [whole[begin - 1 + step, token] for step, token in enumerate(tokens)]


def naive_contrastive(prompt, max_new_tokens, top_k, alpha):
    """Su et al. 2022 as it reads: for each candidate v the sequence with v at its end is run from the beginning."""
    generator, _ = shaken()
    ids, tokens = list(ids_of(prompt)), []
    while len(tokens) < max_new_tokens:
        context = outputs(ids)
        probability = np.exp(log_probs_after(context[-1]))
        score = {}
        for v in np.argsort(-probability, kind="stable")[:top_k].tolist():
            h_v = outputs([*ids, v])[-1]
            cosines = context @ h_v / (np.linalg.norm(context, axis=-1) * np.linalg.norm(h_v))
            score[v] = (1 - alpha) * probability[v] - alpha * max(cosines)
        best = max(score, key=score.__getitem__)
        ids.append(best)
        tokens.append(best)
        if best == generator.tokenizer.end_of_text:
            break
    return tokens


def test_greedy_is_what_the_generator_writes():
    generator, decoder = shaken()
    samples = generator.generate(PROMPTS, dataclasses.replace(CONFIG.generation, max_new_tokens=NEW))
    for got, want in zip(decoder.sample(PROMPTS, NEW), samples, strict=True):
        assert got.tokens == want.tokens
        assert got.finished == want.finished


@pytest.mark.parametrize("penalty", [1.2, 2.5])
def test_the_penalty_counts_every_token_so_far_and_the_prompt(penalty):
    _, decoder = shaken()
    for prompt, got in zip(PROMPTS, decoder.sample(PROMPTS, NEW, repetition_penalty=penalty), strict=True):
        ids = list(ids_of(prompt))
        for token in got.tokens:
            assert token == np.argmax(penalised(ids, penalty))
            ids.append(token)
        assert got.finished or len(got.tokens) == NEW


HOW = {
    "greedy": lambda decoder, prompts, **how: decoder.sample(prompts, NEW, **how),
    "penalty": lambda decoder, prompts, **how: decoder.sample(prompts, NEW, repetition_penalty=1.5, **how),
    "nucleus": lambda decoder, prompts, **how: decoder.sample(prompts, NEW, 0.8, 0.9, 1.2, seed=3, **how),
    "contrastive": lambda decoder, prompts, **how: decoder.contrastive(prompts, NEW, **how),
    "best of": lambda decoder, prompts, **how: decoder.best_of(prompts, NEW, 3, seed=4, **how),
}


@pytest.mark.parametrize("name", HOW)
def test_log_probs_are_those_of_the_model_as_it_is(name):
    _, decoder = shaken()
    for prompt, got in zip(PROMPTS, HOW[name](decoder, PROMPTS), strict=True):
        assert 1 <= len(got.tokens) == len(got.log_probs) <= NEW
        np.testing.assert_allclose(got.log_probs, naive_log_probs(prompt, got.tokens), atol=2e-4)


@pytest.mark.parametrize("name", HOW)
def test_neither_batch_size_nor_order_nor_neighbours_matter(name):
    _, decoder = shaken()
    together = dict(zip(PROMPTS, HOW[name](decoder, PROMPTS), strict=True))
    backwards = dict(zip(PROMPTS[::-1], HOW[name](decoder, PROMPTS[::-1], batch_size=2), strict=True))
    for prompt in PROMPTS:
        [alone] = HOW[name](decoder, [prompt], batch_size=1)
        assert together[prompt].tokens == backwards[prompt].tokens == alone.tokens


@pytest.mark.parametrize(("num_drafts", "settings"), [
    (1, {}), (4, {}), (3, {"temperature": 0.7, "top_p": 0.9, "num_samples": 2, "seed": 5}),
    (3, {"temperature": 0.2, "repetition_penalty": 1.3})])
def test_checked_drafts_change_no_token(num_drafts, settings):
    # Prompts that repeat themselves, so that there is something to look up.
    _, decoder = shaken()
    prompts = [*PROMPTS, "the cat the cat the cat", "a b a b a b a b"]
    plain = decoder.sample(prompts, NEW, **settings)
    checked = decoder.sample(prompts, NEW, num_drafts=num_drafts, **settings)
    for one, other in zip(plain, checked, strict=True):
        assert (one.tokens, one.text, one.finished) == (other.tokens, other.text, other.finished)
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-5)
        assert one.passes == len(one.tokens)
        assert len(other.tokens) / (num_drafts + 1) <= other.passes <= len(other.tokens)


def test_a_loop_is_written_in_fewer_passes():
    # A model whose logits hardly depend on anything says one token again and again.
    flat = dataclasses.replace(CONFIG, objective=ObjectiveConfig(kind="ar", logit_scale=1e-3))
    params = tiny.shaken_params(flat, VOCAB)
    params["backbone"]["head"] = jax.tree.map(jnp.zeros_like, params["backbone"]["head"])
    decoder = Baselines(Generator(flat, params, make_tokenizer(TokenizerConfig(kind="bytes"), [])))
    prompt = [7, 7, 7, 7] if decoder.sample([[7]], 1)[0].tokens[0] != 256 else [9] * 4
    [plain], [checked] = decoder.sample([prompt], 12), decoder.sample([prompt], 12, num_drafts=3)
    assert plain.tokens == checked.tokens
    assert checked.passes <= 12 / 2 or len(plain.tokens) == 1


def test_samples_are_named_by_seed_prompt_and_number():
    _, decoder = shaken()
    several = decoder.sample(PROMPTS, NEW, 1.0, num_samples=4, seed=5, batch_size=3)
    assert several[1].tokens == decoder.sample(PROMPTS[:1], NEW, 1.0, num_samples=2, seed=5)[1].tokens
    assert several[8].tokens == decoder.sample([ids_of(PROMPTS[2])], NEW, 1.0, seed=5)[0].tokens
    other = decoder.sample(PROMPTS, NEW, 1.0, num_samples=4, seed=6)
    assert len({tuple(one.tokens) for one in several + other}) == 2 * 4 * len(PROMPTS)


@pytest.mark.parametrize(("top_k", "alpha"), [(5, 0.6), (3, 0.9), (8, 0.3), (1, 0.6)])
def test_contrastive_search_is_its_equation(top_k, alpha):
    _, decoder = shaken()
    found = decoder.contrastive(PROMPTS, 12, top_k, alpha)
    for prompt, got in zip(PROMPTS, found, strict=True):
        assert got.tokens == naive_contrastive(prompt, 12, top_k, alpha)


def test_contrastive_search_without_its_penalty_is_greedy_and_with_it_is_not():
    _, decoder = shaken()

    def tokens(found):
        return [one.tokens for one in found]

    greedy = tokens(decoder.sample(PROMPTS, NEW))
    assert tokens(decoder.contrastive(PROMPTS, NEW, alpha=0.0)) == greedy
    assert tokens(decoder.contrastive(PROMPTS, NEW, top_k=1, alpha=1.0)) == greedy
    assert tokens(decoder.contrastive(PROMPTS, NEW)) != greedy
    assert len(decoder.contrastive(["the"], NEW, top_k=10_000)) == 1


def test_best_of_takes_the_likeliest_of_the_samples():
    _, decoder = shaken()
    samples = decoder.sample(PROMPTS, NEW, 1.0, num_samples=6, seed=2)
    for row, best in enumerate(decoder.best_of(PROMPTS, NEW, count=6, seed=2)):
        candidates = samples[6 * row : 6 * row + 6]
        assert best in candidates
        assert np.mean(best.log_probs) == max(np.mean(one.log_probs) for one in candidates)
    assert decoder.best_of(PROMPTS, NEW, count=1, seed=2) == decoder.sample(PROMPTS, NEW, 1.0, seed=2)


def test_rows_end_with_end_of_text_or_with_their_budget():
    generator, decoder = shaken()
    end = generator.tokenizer.end_of_text
    found = decoder.sample([""], 60, 3.0, num_samples=40)
    assert 0 < sum(one.finished for one in found) < 40
    for one in found:
        assert end not in one.tokens[:-1]
        assert one.finished == (one.tokens[-1] == end)
        assert one.finished or len(one.tokens) == 60


def test_the_last_position_of_the_model_is_within_reach():
    _, decoder = shaken()
    prompt = [7] * 40
    for found in (decoder.sample([prompt], 55), decoder.contrastive([prompt], 55)):
        np.testing.assert_allclose(found[0].log_probs, [
            log_probs_after(outputs(prompt + found[0].tokens))[39 + step, token]
            for step, token in enumerate(found[0].tokens)], atol=2e-4)
    with pytest.raises(UserError, match="needs 97 positions, the model has 96"):
        decoder.sample([prompt], 56)


@pytest.mark.parametrize(("temperature", "top_p", "penalty"), [(1.0, 1.0, 1.0), (0.7, 0.9, 1.0), (1.5, 0.6, 1.4)])
def test_first_tokens_are_drawn_from_the_distribution_they_should_be(temperature, top_p, penalty):
    _, decoder = shaken()
    total = 1536
    found = decoder.sample(["the cat"], 1, temperature, top_p, penalty, num_samples=total, batch_size=512)
    share = np.exp(log_softmax(penalised(ids_of("the cat"), penalty) / temperature))
    order = np.argsort(-share)
    inside = order[: 1 + np.searchsorted(np.cumsum(share[order]), top_p)]
    expected = total * share[inside] / share[inside].sum()
    counts = np.bincount([one.tokens[0] for one in found], minlength=VOCAB)
    assert counts[inside].sum() == total
    often = expected >= 5
    seen, wanted = (np.append(x[often], x[~often].sum()) for x in (counts[inside], expected))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = np.sum((seen - wanted) ** 2 / wanted), len(wanted) - 1
    # Laurent and Massart 2000, lemma 1: P(χ² ≥ f + 2√(f x) + 2x) ≤ e^−x; here one in a thousand.
    rare = math.log(1000)
    assert freedom > 3
    assert statistic < freedom + 2 * math.sqrt(freedom * rare) + 2 * rare


def test_other_numbers_and_lengths_within_a_bucket_compile_nothing():
    generator, _ = shaken()
    decoder = Baselines(generator)
    decoder.sample(["the cat"], 30)
    assert decoder.compilations() == 2
    decoder.sample(["who sat by"], 40, 0.5, 0.9, 1.3, seed=8)
    decoder.sample([""], 20, 2.0)
    assert decoder.compilations() == 2
    decoder.contrastive(["the cat"], 30)
    assert decoder.compilations() == 3
    decoder.contrastive(["a"], 20, alpha=0.1)
    decoder.best_of(["the cat"], 30, count=1)
    assert decoder.compilations() == 3


def test_other_parameters_are_followed():
    generator = new_generator()
    decoder = Baselines(generator)
    before = decoder.sample(["the cat"], NEW)
    generator.set_params(tiny.shaken_params(CONFIG, VOCAB, seed=9))
    assert decoder.sample(["the cat"], NEW) != before
    assert decoder.compilations() == 2


@pytest.mark.parametrize(("call", "said"), [
    (lambda d: d.sample(["a"], 4, temperature=-0.1), "temperature must be a number from 0 .* found -0.1"),
    (lambda d: d.sample(["a"], 4, temperature=math.nan), "temperature must be .* found nan"),
    (lambda d: d.sample(["a"], 4, top_p=0.0), r"top_p must lie in \(0, 1\], found 0.0"),
    (lambda d: d.sample(["a"], 4, top_p=1.1), r"top_p must lie in \(0, 1\], found 1.1"),
    (lambda d: d.sample(["a"], 4, repetition_penalty=0.9), "repetition_penalty must be .* found 0.9"),
    (lambda d: d.sample(["a"], 4, num_samples=0), "num_samples must be at least 1, found 0"),
    (lambda d: d.sample(["a"], 4, batch_size=0), "batch_size must be at least 1, found 0"),
    (lambda d: d.sample(["a"], 0), "max_new_tokens must be positive, found 0"),
    (lambda d: d.contrastive(["a"], 4, top_k=0), "top_k must be at least 1, found 0"),
    (lambda d: d.contrastive(["a"], 4, alpha=1.5), r"alpha must lie in \[0, 1\], found 1.5"),
    (lambda d: d.best_of(["a"], 4, count=0), "count must be at least 1, found 0"),
    (lambda d: d.sample("a", 4), "prompts must be a list of texts, or of lists of ids, found 'a'"),
    (lambda d: d.sample([[10**6]], 4), "prompt 1 has the id 1000000, the tokenizer has the ids 0"),
    (lambda d: d.sample(["a"], 4, seed=-1), "seed must lie in 0..4294967295, found -1"),
    (lambda d: d.sample(["a"], 4.0), "max_new_tokens must be a whole number, found 4.0"),
    (lambda d: d.sample(["a"], 4, temperature="1"), "temperature must be a number from 0"),
    (lambda d: d.contrastive(["a"], 4, top_k=2.5), "top_k must be a whole number, found 2.5"),
    (lambda d: d.contrastive(["a"], 4, alpha=math.nan), r"alpha must lie in \[0, 1\], found nan"),
])
def test_bad_values_are_refused_in_one_line(call, said):
    with pytest.raises(UserError, match=said) as refused:
        call(shaken()[1])
    assert "\n" not in str(refused.value)


def test_a_maturation_run_is_refused():
    with pytest.raises(UserError, match="needs an autoregressive model"):
        Baselines(new_generator(tiny.CONFIG))


def test_nothing_to_write_is_nothing_written():
    _, decoder = shaken()
    assert decoder.sample([], NEW) == decoder.contrastive([], NEW) == decoder.best_of([], NEW) == []


LOGITS = 3.0 * np.random.default_rng(0).standard_normal((6, 300)).astype(np.float32)


def with_ends(ends):
    """The shaken baseline, but with more tokens that end a text."""
    generator, _ = shaken()
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    tokenizer.ends = (tokenizer.end_of_text, *ends)
    return Generator(CONFIG, generator.params, tokenizer)


def test_no_sample_ends_before_its_least_length():
    free = [one.tokens[:6] for one in shaken()[1].sample(PROMPTS, 6)]
    generator = with_ends({token for tokens in free for token in tokens[:4]})
    decoder, barred = Baselines(generator), list(generator.tokenizer.ends)
    for drafts in (0, 2):
        for prompt, one in zip(PROMPTS, decoder.sample(PROMPTS, 6, min_new_tokens=4, num_drafts=drafts), strict=True):
            ids = list(ids_of(prompt))
            for index, token in enumerate(one.tokens):
                logits = logits_after(outputs(ids)[-1])
                if index < 4:
                    logits[barred] = -np.inf
                assert token == logits.argmax()
                ids.append(token)
            assert one.finished == (one.tokens[-1] in barred)
            assert len(one.tokens) == 6 or (one.finished and len(one.tokens) > 4)
            np.testing.assert_allclose(one.log_probs, naive_log_probs(prompt, one.tokens), atol=1e-4)
    drawn = decoder.sample(PROMPTS, 6, 1.0, num_samples=8, min_new_tokens=6)
    assert all(len(one.tokens) == 6 and not one.finished for one in drawn)
    assert any(len(one.tokens) < 6 for one in decoder.sample(PROMPTS, 6, 1.0, num_samples=8))
    for found in (decoder.contrastive(PROMPTS, 6, min_new_tokens=6), decoder.best_of(PROMPTS, 6, 2, min_new_tokens=6),
                  generator.generate(PROMPTS, dataclasses.replace(CONFIG.generation, max_new_tokens=6,
                                                                  min_new_tokens=6))):
        assert all(len(one.tokens) == 6 and not one.finished for one in found)
    with pytest.raises(UserError, match="min_new_tokens must be at least 0, found -1"):
        decoder.sample(PROMPTS, 6, min_new_tokens=-1)


def test_the_nucleus_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]))
    assert np.isfinite(nucleus(logits, 0.65)).tolist() == [[False, True, False, True], [True, False, False, False]]
    # The second row's last three are equally likely: none of them is preferred.
    assert np.isfinite(nucleus(logits, 0.75)).tolist() == [[False, True, True, True], [True, True, True, True]]
    assert np.isfinite(nucleus(logits, 1e-6)).sum(-1).tolist() == [1, 1]
    np.testing.assert_array_equal(nucleus(logits, 1.0), logits)


def test_a_small_nucleus_or_a_low_temperature_is_greedy():
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    for temperature, top_p in [(0.0, 1.0), (1.0, 1e-6), (1e-4, 1.0)]:
        sampling = Sampling(jnp.float32(temperature), jnp.float32(top_p), jnp.float32(1.0))
        np.testing.assert_array_equal(choose(keys, jnp.asarray(LOGITS), sampling), LOGITS.argmax(-1))


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_and_nucleus_are_those_of_transformers(temperature, top_p):
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[parity]'")
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    warm = TemperatureLogitsWarper(temperature)(None, torch.tensor(LOGITS))
    want = TopPLogitsWarper(top_p)(None, warm).numpy() if top_p < 1 else warm.numpy()
    np.testing.assert_allclose(nucleus(jnp.asarray(LOGITS) / temperature, top_p), want, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.2, 3.0])
def test_the_penalty_is_that_of_transformers(penalty):
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[parity]'")
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = np.random.default_rng(1).integers(0, 300, (6, 100))
    seen = np.zeros(LOGITS.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(LOGITS)).numpy()
    np.testing.assert_allclose(penalise(jnp.asarray(LOGITS), jnp.asarray(seen), penalty), want, rtol=1e-6)


SMALL = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "gpt2": SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama": SMALL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_import_writes_with_a_penalty_what_transformers_writes(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[parity]'")
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **MODELS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path / "hf")
    bpe = train_bpe(["the cat sat on the mat"], 280)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe.fast, eos_token="<|endoftext|>").save_pretrained(tmp_path / "hf")
    import_weights(str(tmp_path / "hf"), tmp_path / "run")
    generator = Generator.from_workdir(tmp_path / "run")

    prompts = [generator.tokenizer.encode(text) for text in ("the cat", "on the mat the", "s")]
    for penalty in (1.0, 1.2):
        found = Baselines(generator).sample(prompts, 40, repetition_penalty=penalty)
        for prompt, got in zip(prompts, found, strict=True):
            begin = torch.tensor([prompt])
            with torch.no_grad():
                out = model.generate(begin, attention_mask=torch.ones_like(begin), do_sample=False, max_new_tokens=40,
                                     repetition_penalty=penalty, pad_token_id=0)
                logits = model(out).logits[0].log_softmax(-1).numpy()
            assert got.tokens == out[0, len(prompt):].tolist()
            np.testing.assert_allclose(got.log_probs, [
                logits[len(prompt) - 1 + step, token] for step, token in enumerate(got.tokens)], atol=1e-4)
