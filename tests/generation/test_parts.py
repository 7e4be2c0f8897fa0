"""Every part that a family of checkpoints brings, in any combination: cached decoding is the uncached oracle's."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from tokmat_jax.config import GenerationConfig, RopeConfig, TokenizerConfig
from tokmat_jax.data.tokenizer import make_tokenizer
from tokmat_jax.generation.batches import sample_key
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.reference import generate_by_reference
from tokmat_jax.model.backbone import make_forward

BASE = dataclasses.replace(tiny.CONFIG.model, num_layers=3, num_heads=4, embed_dim=32)
ROTARY = st.fixed_dictionaries({
    "positions": st.just("rotary"),
    "rope": st.builds(RopeConfig, theta=st.sampled_from([100.0, 1e4]), partial=st.sampled_from([0.25, 0.5, 1.0])),
})
WINDOWS = st.fixed_dictionaries({
    "attention_window": st.integers(1, 9),
    "windowed_layers": st.sampled_from([(0,), (0, 2), (0, 1, 2), (1,)]),
})
PARTS = st.fixed_dictionaries({
    "num_kv_heads": st.sampled_from([1, 2, 4]), "head_dim": st.sampled_from([8, 16]),
    "attention_bias": st.sampled_from(["all", "qkv", "none"]), "query_key_norm": st.booleans(),
    "attention_scale": st.sampled_from([None, 0.3, 1.0]), "mlp": st.sampled_from(
        ["gelu", "gelu_exact", "swiglu", "geglu"]),
    "mlp_bias": st.booleans(), "norm": st.sampled_from(["layer", "rms", "rms_plus_one"]),
    "norm_placement": st.sampled_from(["before", "around"]), "parallel_residual": st.booleans(),
    "film": st.sampled_from(["once", "per_layer"]), "input_norm": st.sampled_from([1.0, 5.0]),
})
SETTINGS = [
    GenerationConfig(tail_length=3, max_new_tokens=8),
    GenerationConfig(tail_length=3, guidance_scale=1.7, repulsion=0.5, max_new_tokens=8),
    GenerationConfig(tail_length=4, commit="verified", max_commit=3, max_new_tokens=8),
    GenerationConfig(tail_length=4, commit="stable", max_commit=3, tolerance=1.0, max_new_tokens=8),
]
PROMPT = [int(x) for x in b"any part, anywhere"]


def models():
    """Models with random parts; a base in windows needs windows."""
    def build(parts, positions, windows, near):
        parts = parts | positions | windows
        if windows and near is not None and parts.get("positions") == "rotary":
            parts["rope"] = dataclasses.replace(parts["rope"], window_theta=near)
        return dataclasses.replace(BASE, **parts)

    return st.builds(build, PARTS, st.just({}) | ROTARY, st.just({}) | WINDOWS, st.sampled_from([None, 50.0]))


EVERYTHING = dataclasses.replace(
    BASE, positions="rotary", rope=RopeConfig(partial=0.5, window_theta=50.0), query_key_norm=True,
    attention_window=5, windowed_layers=(0, 1), mlp="geglu", norm="rms_plus_one", norm_placement="around",
    parallel_residual=True)


def test_cached_decoding_is_the_oracles_for_any_parts():
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])

    def check(model):
        config = dataclasses.replace(tiny.CONFIG, model=model)
        generator = Generator(config, tiny.shaken_params(config, tokenizer.vocab_size), tokenizer)
        padded = tiny.padded_forward.__wrapped__(config)
        for setting in SETTINGS:
            kind = setting
            if setting.commit == "verified":  # whose text is that of immediate projection, told the same K
                kind = dataclasses.replace(setting.with_tail_length(1), commit="front", rate=1.0, model_tail_length=4)
            sample = generator.generate([PROMPT], setting)[0]
            wanted = generate_by_reference(
                functools.partial(padded, generator.backbone), generator.vocabulary, PROMPT, setting.max_new_tokens,
                sample_key(np.array([0, checksum(PROMPT), 0], np.uint32)), generator._tail(kind, None),
                tokenizer.ends, kind.max_commit if kind.commit == "stable" else 1)[0]
            assert sample.tokens == wanted

    settings(max_examples=1, deadline=None)(example(EVERYTHING)(given(models())(check)))()


def test_a_layer_with_a_window_keeps_no_more_than_that_and_what_a_pass_writes():
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), [])
    config = dataclasses.replace(tiny.CONFIG, model=EVERYTHING)
    generator = Generator(config, tiny.shaken_params(config, tokenizer.vocab_size), tokenizer)
    for one, written in zip(SETTINGS, (1, 1, 3, 3), strict=True):
        setting = dataclasses.replace(one, repulsion=0.0)  # whose memory has the history inside
        state, _ = generator._start(generator.rows([PROMPT], setting), setting, 0, None)
        assert [layer.key.shape[2] for layer in state.memory] == [5 + written, 5 + written, 48]


def checksum(prompt):
    """What names a prompt in the key of its samples."""
    return zlib.crc32(np.array(prompt, np.int32).tobytes())


def test_every_part_lowers_for_accelerators():
    config = dataclasses.replace(tiny.CONFIG, model=EVERYTHING)
    params = tiny.shaken_params(config)["backbone"]
    z, ones = jnp.ones((2, 8, 32)), jnp.ones((2, 8))
    args = (params, z, ones, jnp.ones((2,), jnp.int32), jnp.broadcast_to(jnp.arange(8)[None], (2, 8)))
    jax.jit(make_forward(config)).trace(*args).lower(lowering_platforms=("tpu", "cuda"))
