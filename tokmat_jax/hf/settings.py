"""What an exported folder says beside its weights, for `transformers` 4 and 5."""

from pathlib import Path
from typing import Any

from tokmat_jax.config import Config
from tokmat_jax.data.tokenizer import Tokenizer
from tokmat_jax.hf import families
from tokmat_jax.hf.families.family import Family
from tokmat_jax.output import without_torch_notice
from tokmat_jax.storage.files import read_json, write_json


def write_settings(
    folder: Path, family: Family, config: Config, tokenizer: Tokenizer, tied: bool, dtype: str
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files."""
    settings, begin = families.write_settings(family, config), tokenizer.prefix[0] if tokenizer.prefix else None
    fields = {"vocab_size": tokenizer.vocab_size, "tie_word_embeddings": tied, "dtype": dtype,
              "architectures": [family.architecture], "bos_token_id": begin, "eos_token_id": tokenizer.end_of_text}
    settings.update(fields)
    settings.save_pretrained(folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | {"torch_dtype": dtype}
               | _rope_of_version_4(settings))
    generation = {"bos_token_id": begin, "eos_token_id": [*tokenizer.ends] if tokenizer.ends[1:] else tokenizer.ends[0]}
    write_json(folder / "generation_config.json", tokenizer.origin.generation or generation)
    _write_tokenizer(folder, tokenizer, begin)


def _rope_of_version_4(settings: Any) -> dict[str, Any]:
    """Rotary positions as version 4 of `transformers` reads them."""
    stored = getattr(settings, "rope_parameters", None)
    if stored is None:
        return {}
    if "full_attention" in stored:
        full, near = stored["full_attention"], stored["sliding_attention"]
        return _plain_rope(full) | {"rope_local_base_freq": near["rope_theta"]}
    fields = _plain_rope(stored)
    if "partial_rotary_factor" in stored:
        fields |= {"rotary_pct": stored["partial_rotary_factor"], "rotary_emb_base": stored["rope_theta"]}
    return fields


def _plain_rope(stored: dict[str, Any]) -> dict[str, Any]:
    scaling = {name: value for name, value in stored.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return {"rope_theta": stored["rope_theta"],
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, begin: int | None) -> None:
    with without_torch_notice():
        from transformers import PreTrainedTokenizerFast

    origin = tokenizer.origin
    special = {"eos_token": tokenizer.fast.id_to_token(tokenizer.end_of_text)}
    if begin is not None:
        special["bos_token"] = tokenizer.fast.id_to_token(begin)
    length = {} if origin.max_length is None else {"model_max_length": origin.max_length}
    writer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast, **(special | origin.special_tokens), **length)
    writer.chat_template = origin.chat_template
    writer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # Version 5 names a class that version 4 does not know.
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
