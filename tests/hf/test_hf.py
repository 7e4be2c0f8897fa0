"""Imported weights against the implementation that they come from."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.data.tokenizer import train_bpe
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf import families
from tokmat_jax.hf.convert import export_weights, import_weights, load_flat, nested
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.model.params import vocabulary_of
from tokmat_jax.training import objective

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = SMALL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = LLAMA | {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 6, "sliding_window_pattern": 3,
                 "query_pre_attn_scalar": 16}
NEOX = SMALL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                "max_position_embeddings": 128}
GPT2 = SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

MODELS = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, wide": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 80}),
    "llama untied": ("llama", LLAMA),
    "llama tied, biases": ("llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3}}),
    "llama dynamic": ("llama", LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e3}}),
    "llama llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", LLAMA | {"rope_parameters": YARN, "head_dim": 16}),
    "qwen2 tied": ("qwen2", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2 windows": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "qwen3 tied, biases, windows": ("qwen3", LLAMA | {
        "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "use_sliding_window": True,
        "sliding_window": 5, "max_window_layers": 1}),
    "mistral": ("mistral", LLAMA | {"sliding_window": None}),
    "mistral windows": ("mistral", LLAMA | {"sliding_window": 9}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3 linear, biases": ("gemma3_text", GEMMA | {
        "attention_bias": True, "query_pre_attn_scalar": 20, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox in sequence, tied": ("gpt_neox", NEOX | {
        "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "gelu_new",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
}


def make(name, folder: Path, dtype=torch.float32, **how):
    """A random model of `transformers`, saved; nothing in it is zero or one any more."""
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **how)
    tokenizer = train_bpe(["the cat sat on the mat"], 280)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.fast, eos_token="<|endoftext|>").save_pretrained(folder)
    return model


IDS = np.random.default_rng(0).integers(1, 280, (2, 64))


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_greedy_text_are_those_of_transformers(name, tmp_path):
    model = make(name, tmp_path / "hf")
    import_weights(str(tmp_path / "hf"), tmp_path / "run")
    config, tokenizer, flat = load_flat(tmp_path / "run")
    params = jax.tree.map(jnp.asarray, nested(flat))
    assert tokenizer.vocab_size == 300

    positions = jnp.broadcast_to(jnp.arange(64)[None], (2, 64))
    tokens = vocabulary_of(params, config)
    prediction, _ = jax.jit(make_forward(config))(
        params["backbone"], tokens.table[IDS], jnp.ones((2, 64)), jnp.zeros((2,), jnp.int32), positions)
    with torch.no_grad():
        want = model(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(prediction @ tokens.readout.T, want, atol=1e-4)

    def loss(params):
        keys = jax.random.split(jax.random.key(0), 2)
        total, sums = objective.loss_sums(params, jnp.asarray(IDS), keys, jnp.arange(1), config, make_forward(config))
        return total / sums["weight"]

    got_loss, gradient = jax.jit(jax.value_and_grad(loss))(params)
    want_loss = model(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
    want_loss.backward()
    np.testing.assert_allclose(got_loss, want_loss.item(), rtol=1e-5)
    flat_gradient = {"/".join(str(k.key) for k in path): np.asarray(leaf)
                     for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
    wanted = dict(model.named_parameters())
    for weight in families.weights(MODELS[name][0], config.model, config.table.tied):
        for layer in range(config.model.num_layers if weight.per_layer else 1):
            ours = families.get(weight, layer, flat_gradient)
            name = weight.name.replace("embed_out", "lm_head")  # GPT-NeoX's, in files
            theirs = wanted[name.format(layer=layer)].grad.numpy()
            assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs) + 1e-6, weight.name

    generator = Generator.from_workdir(tmp_path / "run")
    settings = dataclasses.replace(config.generation, max_new_tokens=60)
    prompt = "the cat"
    begin = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        out = model.generate(begin, attention_mask=torch.ones_like(begin), do_sample=False, max_new_tokens=60,
                             pad_token_id=0)
    sample = generator.generate([prompt], settings)[0]
    assert sample.tokens == out[0, begin.shape[1]:].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama untied", "llama yarn", "qwen2 tied", "qwen3 tied, biases, windows",
                                  "mistral windows", "gemma3 linear, biases", "gpt_neox"])
@pytest.mark.parametrize(("dtype", "shard"), [("float32", None), ("bfloat16", "20KB")])
def test_in_and_out_again_is_bit_equal(name, dtype, shard, tmp_path):
    how = {} if shard is None else {"max_shard_size": shard}
    make(name, tmp_path / "hf", getattr(torch, dtype), **how)
    import_weights(str(tmp_path / "hf"), tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "back")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 1 or shard is not None
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").state_dict()
                     for folder in ("hf", "back"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype == getattr(torch, dtype)
        assert torch.equal(value, after[key]), key
    import_weights(str(tmp_path / "back"), tmp_path / "again")
    (_, _, one), (_, _, two) = load_flat(tmp_path / "run"), load_flat(tmp_path / "again")
    assert one.keys() == two.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, two[path], err_msg=path)
