"""GGUF files against the safetensors of the same model."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tokmat_jax.data.tokenizer import Tokenizer, train_bpe
from tokmat_jax.errors import UserError
from tokmat_jax.hf.convert import import_weights, load_flat

gguf = pytest.importorskip("gguf", reason="GGUF files need gguf: pip install -e '.[parity]'")
torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="builds the tokenizer of a GGUF file")

SMALL = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 0}
LLAMA = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
MODELS = {
    "llama untied": ("llama", LLAMA),
    "llama tied, biases, wide heads": ("llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True,
                                                         "mlp_bias": True, "head_dim": 16}),
    "llama linear": ("llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    "qwen2 tied": ("qwen2", LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "gemma3": ("gemma3_text", LLAMA | {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 24,
                                       "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", SMALL | {
        "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "use_parallel_residual": False, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.25}}),
    "gpt2": ("gpt2", SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}),
}
PROMPT = "the cat sat on 3 mats, and who's there?\n  ∂x"


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores those of queries and keys: halves of a head interleaved."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def to_gguf(name: str, array: np.ndarray, settings: Any) -> np.ndarray:
    """A weight of `transformers` in llama.cpp's layout."""
    if settings.model_type == "llama" and "q_proj" in name:
        return permute(array, settings.num_attention_heads)
    if settings.model_type == "llama" and "k_proj" in name:
        return permute(array, settings.num_key_value_heads)
    if "query_key_value" in name:
        by_head = array.reshape(settings.num_attention_heads, 3, -1, *array.shape[1:])
        return np.concatenate([by_head[:, part].reshape(-1, *array.shape[1:]) for part in range(3)])
    if settings.model_type == "gpt2" and ".c_" in name and array.ndim == 2:
        return np.ascontiguousarray(array.T)
    return array + 1 if settings.model_type == "gemma3_text" and name.endswith("norm.weight") else array


def rounded(name: str, array: np.ndarray, settings: Any, kind: Any) -> np.ndarray:
    """What is left of a weight of `transformers` once it has been stored as `kind`."""
    if array.ndim == 1:
        return to_gguf(name, array, settings) - 1 if settings.model_type == "gemma3_text" else array
    turned = settings.model_type == "gpt2" and ".c_" in name
    kept = gguf.dequantize(gguf.quantize(array.T if turned else array, kind), kind)
    return np.ascontiguousarray(kept.T if turned else kept, np.float32)


def describe(writer: Any, settings: Any) -> None:
    """Metadata of the model."""
    gpt2 = settings.model_type == "gpt2"
    writer.add_context_length(settings.n_positions if gpt2 else settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_feed_forward_length(settings.n_inner if gpt2 else settings.intermediate_size)
    if gpt2:
        writer.add_layer_norm_eps(settings.layer_norm_epsilon)
        return
    if settings.model_type == "gpt_neox":
        writer.add_layer_norm_eps(settings.layer_norm_eps)
        writer.add_parallel_residual(settings.use_parallel_residual)
        writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(2)
        return
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    rope = settings.rope_parameters.get("full_attention", settings.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(settings, "head_dim", None):
        writer.add_key_length(settings.head_dim)
        writer.add_rope_dimension_count(settings.head_dim)
    if settings.model_type == "gemma3_text":
        writer.add_sliding_window(settings.sliding_window)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Metadata of a byte-level BPE; the table may have more rows."""
    vocabulary = tokenizer.fast.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index == tokenizer.end_of_text else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.fast.to_str())["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.end_of_text)


class Model:
    """A random model of `transformers` and a tokenizer, as weights by name."""

    def __init__(self, name: str):
        kind, fields = MODELS[name]
        torch.manual_seed(0)
        self.settings = transformers.AutoConfig.for_model(kind, **fields)
        model = transformers.AutoModelForCausalLM.from_config(self.settings)
        self.weights = {name: (value + 0.2 * torch.randn_like(value)).numpy() for name, value in
                        model.state_dict().items() if name != "lm_head.weight" or not self.settings.tie_word_embeddings}
        self.tokenizer = train_bpe(["the cat sat on the mat"], 275)

    def save_folder(self, folder: Path, kind: Any) -> Path:
        """As safetensors, rounded as `kind` does."""
        self.settings.save_pretrained(folder)
        found = {name: rounded(name, array, self.settings, kind) for name, array in self.weights.items()}
        safetensors.numpy.save_file(found, folder / "model.safetensors")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer.fast, eos_token="<|endoftext|>").save_pretrained(folder)
        return folder

    def save_gguf(self, file: Path, kind: Any, architecture: str | None = None, tokenizer: bool = True,
                  change: Callable[[Any], None] = lambda writer: None) -> Path:
        """As GGUF; what `change` adds to the metadata replaces what is there."""
        own = self.settings.model_type.removesuffix("_text").replace("gpt_neox", "gptneox")
        writer = gguf.GGUFWriter(file, architecture or own)
        describe(writer, self.settings)
        if tokenizer:
            add_tokenizer(writer, self.tokenizer)
        names = gguf.get_tensor_name_map(
            gguf.MODEL_ARCH[own.upper()], self.settings.num_hidden_layers)
        stored = {names.get_name(name, (".weight", ".bias")): to_gguf(name, array, self.settings)
                  for name, array in self.weights.items()}
        if self.settings.model_type == "gpt2":
            stored["output.weight"] = stored["token_embd.weight"]  # as llama.cpp's converter does
        for name, array in stored.items():
            plain = array.ndim == 1 or kind == gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, array if plain else gguf.quantize(array, kind), raw_dtype=None if plain else kind)
        change(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_what_the_safetensors_give(name, kind, tmp_path):
    model, kind = Model(name), gguf.GGMLQuantizationType[kind]
    import_weights(str(model.save_folder(tmp_path / "hf", kind)), tmp_path / "folder")
    found = import_weights(str(model.save_gguf(tmp_path / "model.gguf", kind)), tmp_path / "file")
    assert (found.model_type, found.dtype) == (model.settings.model_type, "float32")
    (config, tokenizer, flat), (other, twin, wanted) = load_flat(tmp_path / "file"), load_flat(tmp_path / "folder")
    assert flat.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(flat[path], array, err_msg=path)
    own = tokenizer.encode(PROMPT)
    assert (own, tokenizer.decode(own)) == (twin.encode(PROMPT), PROMPT)
    assert (tokenizer.end_of_text, tokenizer.prefix, tokenizer.vocab_size) == (0, (), 300)
    there = str(tmp_path / "folder")
    assert dataclasses.replace(
        config, workdir=there, tokenizer=dataclasses.replace(config.tokenizer, name=there)) == other


def refusal(file: Path) -> str:
    before = sorted(file.parent.iterdir())
    with pytest.raises(UserError) as caught:
        import_weights(str(file), file.parent / "out")
    assert sorted(file.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model("llama untied")


F32 = gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.9999])
def test_a_truncated_file_is_damaged(share, llama, tmp_path):
    file = llama.save_gguf(tmp_path / "model.gguf", F32)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    message = refusal(file)
    assert message.startswith(f"{file} is damaged: ")
    assert message.endswith("fetch it again")


def test_a_file_of_something_else_is_damaged(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no GGUF at all" * 100)
    assert "is damaged: GGUF magic invalid" in refusal(tmp_path / "model.gguf")


REFUSED = {
    "a table of rotary frequencies": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), ["rope_freqs.weight", "safetensors"]),
    "unknown weight": (lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((2, 32), np.float32)),
                       ["unknown weight 'blk.0.ffn_gate_inp.weight'"]),
    "wrong shape": (lambda w: w.add_feed_forward_length(48), ["mlp.gate_proj.weight has shape (64, 32)", "(48, 32)"]),
    "missing layer": (lambda w: w.add_block_count(3), ["model.layers.2.", "is missing"]),
    "yarn": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), ["'yarn'", "safetensors"]),
    "part of a head is turned": (lambda w: w.add_rope_dimension_count(4), ["rope.dimension_count", "4", "8"]),
    "heads of every layer": (lambda w: w.add_head_count([4, 4]), ["llama.attention.head_count is [4, 4]", "one int"]),
    "no number": (lambda w: w.add_string("llama.block_count", "two"), ["llama.block_count is 'two'", "one int"]),
    "end of text beyond the table": (lambda w: w.add_eos_token_id(999), ["999", "300 rows"]),
    "beginning without an id": (lambda w: w.add_add_bos_token(True), ["tokenizer.ggml.bos_token_id"]),
    "heads that do not divide": (lambda w: w.add_head_count(5), ["model.gguf", "attention heads (5)"]),
    "another tokenizer": (lambda w: w.add_tokenizer_model("runes"), ["tokenizer", "'runes'"]),
}


def test_a_beginning_of_text_comes_along(llama, tmp_path):
    def begin(writer):
        writer.add_bos_token_id(7)
        writer.add_add_bos_token(True)

    import_weights(str(llama.save_gguf(tmp_path / "model.gguf", F32, change=begin)), tmp_path / "run")
    assert load_flat(tmp_path / "run")[1].prefix == (7,)


@pytest.mark.parametrize("kind", ["llama-bpe", "tekken"])
def test_a_pre_tokeniser_with_which_llama_cpp_begins_texts_does_so_here(kind, llama, tmp_path):
    def change(writer):
        writer.add_bos_token_id(7)
        writer.add_tokenizer_pre(kind)

    import_weights(str(llama.save_gguf(tmp_path / "model.gguf", F32, change=change)), tmp_path / "run")
    assert load_flat(tmp_path / "run")[1].prefix == (7,)


def test_chat_template_and_special_tokens_come_along(llama, tmp_path):
    def change(writer):
        writer.add_chat_template("{{ messages }}")
        writer.add_pad_token_id(0)
        writer.add_eot_token_id(5)

    import_weights(str(llama.save_gguf(tmp_path / "model.gguf", F32, change=change)), tmp_path / "run")
    tokenizer = load_flat(tmp_path / "run")[1]
    assert tokenizer.origin.chat_template == "{{ messages }}"
    assert tokenizer.origin.special_tokens == {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.ends == (0, 5)


def split(model: Model, folder: Path) -> list[Path]:
    """The model in two files, as llama.cpp splits them: the metadata are in the first."""
    whole, names = dict(model.weights), sorted(model.weights)
    files = [folder / f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, file in enumerate(files):
        model.weights = {name: whole[name] for name in names[number::2]}
        if number == 0:
            model.save_gguf(file, F32)
        else:
            writer = gguf.GGUFWriter(file, "llama")
            writer.data_type = None
            found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
            for name, array in model.weights.items():
                writer.add_tensor(found.get_name(name, (".weight", ".bias")), to_gguf(name, array, model.settings))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    model.weights = whole
    return files


def test_a_split_file_and_a_folder_with_one_file_are_read(tmp_path):
    model = Model("llama untied")
    import_weights(str(model.save_gguf(tmp_path / "model.gguf", F32)), tmp_path / "whole")
    wanted = load_flat(tmp_path / "whole")[2]
    for folder in ("split", "alone"):
        (tmp_path / folder).mkdir()
    first, second = split(model, tmp_path / "split")
    (tmp_path / "model.gguf").rename(tmp_path / "alone" / "any name.gguf")
    for number, source in enumerate((first, second, tmp_path / "split", tmp_path / "alone")):
        import_weights(str(source), tmp_path / str(number))
        found = load_flat(tmp_path / str(number))[2]
        assert found.keys() == wanted.keys()
        for path, array in wanted.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
    second.unlink()
    assert "model-00002-of-00002.gguf is not there: fetch it too" in refusal(first)


def test_a_type_that_the_library_does_not_know_is_no_damage(llama, tmp_path):
    file = llama.save_gguf(tmp_path / "model.gguf", F32)
    content = bytearray(file.read_bytes())
    name = b"output_norm.weight"
    place = content.index(name) + len(name) + 4 + 8  # after the number of axes and the only one of them
    content[place : place + 4] = (999).to_bytes(4, "little")
    file.write_bytes(content)
    assert "'output_norm.weight' has the type number 999, which the installed package gguf does not" in refusal(file)


def test_a_number_that_is_not_finite_is_named(tmp_path):
    model = Model("llama untied")
    model.weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    message = refusal(model.save_gguf(tmp_path / "model.gguf", F32))
    assert "is damaged: blk.1.ffn_up.weight has numbers that are not finite" in message


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_expressed_is_refused_by_name(case, llama, tmp_path):
    change, says = REFUSED[case]
    file = tmp_path / "model.gguf"
    message = refusal(llama.save_gguf(file, F32, change=change))
    for part in says:
        assert part in message


def test_another_architecture_and_a_missing_tokenizer_are_named(llama, tmp_path):
    file = llama.save_gguf(tmp_path / "mamba.gguf", F32, architecture="mamba")
    assert refusal(file).endswith(
        "architecture 'mamba' is not supported; supported are llama, qwen2, qwen3, gemma3, gpt2, gptneox")
    file = llama.save_gguf(tmp_path / "mute.gguf", F32, tokenizer=False)
    assert "mute.gguf has no tokenizer with an end-of-text (tokenizer.ggml.tokens, eos_token_id)" in refusal(file)
