"""A GGUF file as stored weights: names, layouts and settings of llama.cpp are converted to those of `transformers`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmat_jax.data.tokenizer import Origin, Tokenizer
from tokmat_jax.errors import UserError, one_line, shown
from tokmat_jax.hf import families
from tokmat_jax.hf.files import check_finite, refuse_pointer
from tokmat_jax.hf.gguf_header import Place, read_header
from tokmat_jax.output import without_torch_notice

_EXTRA = "a GGUF file needs the package gguf: pip install -e '.[gguf]'"

_LLAMA = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "blk.{layer}.attn_norm": "model.layers.{layer}.input_layernorm",
    "blk.{layer}.ffn_norm": "model.layers.{layer}.post_attention_layernorm",
    "blk.{layer}.attn_q": "model.layers.{layer}.self_attn.q_proj",
    "blk.{layer}.attn_k": "model.layers.{layer}.self_attn.k_proj",
    "blk.{layer}.attn_v": "model.layers.{layer}.self_attn.v_proj",
    "blk.{layer}.attn_output": "model.layers.{layer}.self_attn.o_proj",
    "blk.{layer}.ffn_gate": "model.layers.{layer}.mlp.gate_proj",
    "blk.{layer}.ffn_up": "model.layers.{layer}.mlp.up_proj",
    "blk.{layer}.ffn_down": "model.layers.{layer}.mlp.down_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{layer}.attn_norm": "transformer.h.{layer}.ln_1",
    "blk.{layer}.ffn_norm": "transformer.h.{layer}.ln_2",
    "blk.{layer}.attn_qkv": "transformer.h.{layer}.attn.c_attn",
    "blk.{layer}.attn_output": "transformer.h.{layer}.attn.c_proj",
    "blk.{layer}.ffn_up": "transformer.h.{layer}.mlp.c_fc",
    "blk.{layer}.ffn_down": "transformer.h.{layer}.mlp.c_proj",
}
_QWEN3 = _LLAMA | {
    "blk.{layer}.attn_q_norm": "model.layers.{layer}.self_attn.q_norm",
    "blk.{layer}.attn_k_norm": "model.layers.{layer}.self_attn.k_norm",
}
_GEMMA3 = _QWEN3 | {
    "blk.{layer}.post_attention_norm": "model.layers.{layer}.post_attention_layernorm",
    "blk.{layer}.ffn_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "blk.{layer}.post_ffw_norm": "model.layers.{layer}.post_feedforward_layernorm",
}
_GPTNEOX = {
    "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
    "blk.{layer}.attn_norm": "gpt_neox.layers.{layer}.input_layernorm",
    "blk.{layer}.ffn_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
    "blk.{layer}.attn_qkv": "gpt_neox.layers.{layer}.attention.query_key_value",
    "blk.{layer}.attn_output": "gpt_neox.layers.{layer}.attention.dense",
    "blk.{layer}.ffn_up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
    "blk.{layer}.ffn_down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
}
_NAMES = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3, "gemma3": _GEMMA3, "gpt2": _GPT2, "gptneox": _GPTNEOX}
_MODEL_TYPES = {"gemma3": "gemma3_text", "gptneox": "gpt_neox"}
"""Names of `transformers` for architectures that it calls otherwise."""
_LAYERS_OF_GEMMA3_27B = 62
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 999
_BEGIN_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Pre-tokenisers with which llama.cpp puts a beginning-of-text before every text, unless the file says otherwise."""


@dataclass(frozen=True)
class _Weight:
    name: str
    """The name that llama.cpp uses."""
    kind: Any
    """Type, a `GGMLQuantizationType`."""
    shape: tuple[int, ...]
    data: np.ndarray
    """Bytes of its rows, mapped into memory."""


class Gguf:
    """The weights of a GGUF file, dequantised as they are read, under the names of `transformers`."""

    dtype: str = "float32"
    notes: tuple[str, ...] = ()

    def __init__(self, file: Path):
        try:
            import gguf
        except ImportError:
            raise UserError(_EXTRA) from None
        self._file, self._gguf = file, gguf
        self._facts: dict[str, Any] = {}
        weights: list[_Weight] = []
        for part in parts_of(file):
            facts, found = self._open(part)
            self._facts, weights = facts | self._facts, weights + found
        self.architecture = str(self._facts.get("general.architecture"))
        if self.architecture not in _NAMES:
            raise UserError(f"{file}: architecture {shown(self.architecture)} is not supported; supported are "
                            f"{', '.join(_NAMES)}")
        self.model_type = _MODEL_TYPES.get(self.architecture, self.architecture)
        self._weights = {self._rename(weight.name): weight for weight in weights}
        own = _NAMES[self.architecture]
        self._head = f"{own['output']}.weight"
        head, table = self._weights.get(self._head), self._weights.get(f"{own['token_embd']}.weight")
        # GPT-2's files hold a copy of the table as their head.
        if head is not None and table is not None and head.kind == table.kind and np.array_equal(head.data, table.data):
            del self._weights[self._head]
        self.shapes = {name: self._shape(name, weight) for name, weight in self._weights.items()}

    def _open(self, file: Path) -> tuple[dict[str, Any], list[_Weight]]:
        try:
            facts, places = read_header(file)
            content = np.memmap(file, mode="r")
            return facts, [self._weight(place, content, file) for place in places]
        except (OSError, ValueError) as error:
            refuse_pointer(file)
            raise UserError(f"{file} is damaged: {one_line(error)}; fetch it again") from None

    def _weight(self, place: Place, content: np.ndarray, file: Path) -> _Weight:
        """The weight at `place`; raises ValueError unless the file has all of it, UserError for an unknown type."""
        if place.kind not in {kind.value for kind in self._gguf.GGMLQuantizationType}:
            raise UserError(f"{file}: {shown(place.name)} has the type number {place.kind}, which the installed "
                            f"package gguf does not know: update it (pip install -U gguf), or take a file of another "
                            f"type")
        kind = self._gguf.GGMLQuantizationType(place.kind)
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        rows, row = place.shape[:0:-1], place.shape[0]
        shape = (*rows, row // block * size)
        end = place.begin + math.prod(shape)
        if row % block or end > len(content):
            raise ValueError(f"{place.name} of the type {kind.name} and the shape {place.shape} ends at byte {end:,} "
                             f"of {len(content):,}, or inside a block")
        return _Weight(place.name, kind, (*rows, row), content[place.begin : end].reshape(shape))

    def _rename(self, name: str) -> str:
        stem, _, part = name.rpartition(".")
        layer = re.match(r"blk\.(\d+)\.", stem)
        known = _NAMES[self.architecture].get(re.sub(r"^blk\.\d+\.", "blk.{layer}.", stem))
        if name == "rope_freqs.weight":
            raise UserError(f"{self._file}: its rotary frequencies are scaled by a table (rope_freqs.weight); import "
                            f"the safetensors it was made from")
        if known is None:
            raise UserError(f"{self._file}: unknown weight {shown(name)}")
        return f"{known.format(layer=layer[1]) if layer else known}.{part}"

    def _is_transposed(self, name: str) -> bool:
        """GPT-2's matrices are [in, out] for `transformers` and [out, in] here."""
        return self.architecture == "gpt2" and name.endswith(".weight") and ".c_" in name

    def _shape(self, name: str, weight: _Weight) -> tuple[int, ...]:
        return weight.shape[::-1] if self._is_transposed(name) else weight.shape

    def read(self, name: str) -> np.ndarray:
        weight = self._weights[name]
        try:
            array = np.asarray(self._gguf.dequantize(weight.data, weight.kind), np.float32).reshape(weight.shape)
        except Exception as error:
            raise UserError(f"{self._file} is damaged at {weight.name}: {one_line(error)}; fetch it again") from None
        check_finite(weight.name, array, self._file)
        if self._is_transposed(name):
            return array.T
        if self.architecture == "llama" and (part := re.search(r"self_attn\.([qk])_proj", name)):
            heads = self._fact("attention.head_count", int)
            return _unpermute(array, self._fact("attention.head_count_kv", int, heads) if part[1] == "k" else heads)
        if "query_key_value" in name:  # all queries, all keys, all values here; side by side in each head there
            heads = self._fact("attention.head_count", int)
            return array.reshape(3, heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        # llama.cpp stores the factors of Gemma's norms, 1 + weight.
        return array - 1 if self.architecture == "gemma3" and name.endswith("norm.weight") else array

    def _fact(self, name: str, kind: type, default: Any = None) -> Any:
        """The architecture's entry `name` in the metadata; raises UserError unless it is a `kind`."""
        found = self._facts.get(f"{self.architecture}.{name}", default)
        if type(found) is not kind:
            what = "missing" if found is None else shown(found)
            raise UserError(f"{self._file}: {self.architecture}.{name} is {what}, it must be one {kind.__name__}")
        return _short(found) if kind is float else found

    def settings(self) -> Any:
        """The config object of `transformers` that the metadata describe."""
        with without_torch_notice():
            from transformers import CONFIG_MAPPING

        kind = CONFIG_MAPPING[self.model_type]
        fields = {"gpt2": self._gpt2_fields, "gemma3": self._gemma3_fields, "gptneox": self._gptneox_fields}.get(
            self.architecture, self._llama_fields)
        shared = {"tie_word_embeddings": self._head not in self._weights}
        try:
            return kind(**shared, **fields())
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self._file}: its metadata describe no model: {one_line(error)}") from None

    def _rows(self, name: str) -> int:
        if name not in self.shapes:
            raise UserError(f"{self._file}: weight {name} is missing")
        return self.shapes[name][0]

    def _num_layers(self) -> int:
        found = self._fact("block_count", int)
        families.check_count(found, f"{self.architecture}.block_count", self._file)
        return found

    def _gpt2_fields(self) -> dict[str, Any]:
        return {
            "vocab_size": self._rows("transformer.wte.weight"), "n_embd": self._fact("embedding_length", int),
            "n_layer": self._num_layers(), "n_head": self._fact("attention.head_count", int),
            "n_inner": self._fact("feed_forward_length", int), "n_positions": self._fact("context_length", int),
            "layer_norm_epsilon": self._fact("attention.layer_norm_epsilon", float),
        }

    def _gptneox_fields(self) -> dict[str, Any]:
        heads, size = self._fact("attention.head_count", int), self._fact("embedding_length", int)
        head_dim = size // max(heads, 1)
        turned = self._fact("rope.dimension_count", int, head_dim)
        return {
            "vocab_size": self._rows("gpt_neox.embed_in.weight"), "hidden_size": size,
            "num_hidden_layers": self._num_layers(), "num_attention_heads": heads,
            "intermediate_size": self._fact("feed_forward_length", int),
            "max_position_embeddings": self._fact("context_length", int),
            "layer_norm_eps": self._fact("attention.layer_norm_epsilon", float),
            "use_parallel_residual": self._fact("use_parallel_residual", bool, True),
            "rope_parameters": self._rope() | {"partial_rotary_factor": turned / max(head_dim, 1)},
        }

    def _llama_fields(self) -> dict[str, Any]:
        heads, size = self._fact("attention.head_count", int), self._fact("embedding_length", int)
        head_dim = self._fact("attention.key_length", int, size // max(heads, 1))
        turned = self._fact("rope.dimension_count", int, head_dim)
        if turned != head_dim:
            raise UserError(f"{self._file}: {self.architecture}.rope.dimension_count = {turned} is not supported; it "
                            f"must be the size of a head, {head_dim}")
        fields = {
            "vocab_size": self._rows("model.embed_tokens.weight"), "hidden_size": size,
            "intermediate_size": self._fact("feed_forward_length", int),
            "num_hidden_layers": self._num_layers(), "num_attention_heads": heads,
            "num_key_value_heads": self._fact("attention.head_count_kv", int, heads),
            "head_dim": None if head_dim * heads == size else head_dim,  # as a config.json has it
            "rms_norm_eps": self._fact("attention.layer_norm_rms_epsilon", float),
            "max_position_embeddings": self._fact("context_length", int), "rope_parameters": self._rope(),
        }
        if self.architecture == "qwen3":
            fields |= {"head_dim": head_dim}
        if self.architecture == "llama":
            fields |= {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._weights,
                       "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._weights}
        return fields

    def _gemma3_fields(self) -> dict[str, Any]:
        fields = self._llama_fields()
        heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
        size = fields["head_dim"] or fields["hidden_size"] // max(heads, 1)
        # llama.cpp knows the pattern of the windows by heart, and what the largest model scales its queries by.
        scalar = fields["hidden_size"] // max(heads, 1) if layers == _LAYERS_OF_GEMMA3_27B else size
        near = {"rope_type": "default", "rope_theta": self._fact("rope.freq_base_swa", float, 10_000.0)}
        return fields | {
            "head_dim": size, "query_pre_attn_scalar": scalar,
            "sliding_window": self._fact("attention.sliding_window", int),
            "rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": near}}

    def _rope(self) -> dict[str, Any]:
        kind = self._fact("rope.scaling.type", str, "none")
        if kind not in ("none", "linear"):
            raise UserError(f"{self._file}: rotary scaling {shown(kind)} is not supported in a GGUF file; import the "
                            f"safetensors it was made from")
        theta = {"rope_theta": self._fact("rope.freq_base", float, 10_000.0)}
        if kind == "none":
            return theta | {"rope_type": "default"}
        return theta | {"rope_type": "linear", "factor": self._fact("rope.scaling.factor", float)}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the metadata; raises UserError if there is none or it cannot be built."""
        try:
            with without_torch_notice():
                from transformers.integrations.gguf.gguf_tokenizer_mapping import (
                    GGUF_TOKENIZER_MAPPING,
                    convert_gguf_tokenizer,
                )
        except ImportError:
            raise UserError(f"the installed transformers cannot build the tokenizer of a GGUF file; {_EXTRA}") from None
        names = {f"tokenizer.{key}": name for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()}
        facts = {name: self._facts[key] for key, name in names.items() if key in self._facts}
        known = facts.get("tokenizer_type") == "llama" or facts.get("pre_tokenizer_type") in _BEGIN_FIRST
        begins = self._facts.get("tokenizer.ggml.add_bos_token", known)
        if begins and not isinstance(facts.get("bos_token_id"), int):
            raise UserError(f"{self._file}: its texts begin with a token that it does not name "
                            f"(tokenizer.ggml.bos_token_id)")
        if "tokens" not in facts or not isinstance(facts.get("eos_token_id"), int):
            raise UserError(f"{self._file} has no tokenizer with an end-of-text (tokenizer.ggml.tokens, eos_token_id)")
        try:
            fast, _ = convert_gguf_tokenizer(self.architecture, facts)
        except Exception as error:
            raise UserError(f"{self._file}: its tokenizer cannot be built: {one_line(error)}") from None
        return Tokenizer(fast, facts["eos_token_id"], [facts["bos_token_id"]] if begins else (),
                         other_ends=[end for end in [self._facts.get("tokenizer.ggml.eot_token_id")]
                                     if isinstance(end, int)], origin=self._origin(fast))

    def _origin(self, fast: Any) -> Origin:
        template = self._facts.get("tokenizer.chat_template")
        ids = {name: self._facts.get(f"tokenizer.ggml.{key}_token_id") for name, key in (
            ("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))}
        special = {name: fast.id_to_token(token) for name, token in ids.items() if isinstance(token, int)
                   and 0 <= token < fast.get_vocab_size()}
        return Origin(template if isinstance(template, str) else None,
                      {name: token for name, token in special.items() if token is not None})


def parts_of(file: Path) -> list[Path]:
    """All files of the model in `file`: itself, or every part of a split one; raises UserError if one is not there."""
    found = _PART.fullmatch(file.name)
    if found is None:
        return [file]
    total = int(found[3])
    if not 1 <= total <= _MOST_PARTS:
        raise UserError(f"{file}: a model in {total} parts is not supported")
    parts = [file.with_name(f"{found[1]}-{number:05d}-of-{total:05d}.gguf") for number in range(1, total + 1)]
    for part in parts:
        if not part.is_file():
            raise UserError(f"{file} is a part of a model in {total} files, and {part.name} is not there: fetch it too")
    return parts


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys [H · D, …] from llama.cpp's order, in which the two of a rotary pair are adjacent."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: metadata are float32, so an intended 1e-5 arrives inexact."""
    return float(str(np.float32(value)))
