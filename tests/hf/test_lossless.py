"""Nothing is lost on the way in or out (chat template, special tokens, generation settings), and files of others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import checkpoints
import runs
from checkpoints import QUERY, SINGLE, TABLE, store, weights
from scripts import rows as rows_of
from tokmat_jax.commands import generate
from tokmat_jax.config import GenerationConfig
from tokmat_jax.data.tokenizer import load_tokenizer
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf.convert import export_weights, import_weights, load_flat

transformers = pytest.importorskip("transformers")

TEMPLATE = ("{{ bos_token }}{% for one in messages %}<|{{ one.role }}|>{{ one.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
EXTRA = ["<|user|>", "<|assistant|>", "<|end|>"]
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 7], "pad_token_id": 5}


@pytest.fixture
def instruct(tmp_path) -> Path:
    """A checkpoint of an instruct model: extra special tokens, a chat template, several ends."""
    folder = tmp_path / "instruct"
    folder.mkdir()
    checkpoints.write(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|user|>", "pad_token": "<|end|>", "unk_token": "<|assistant|>",
                                  "additional_special_tokens": EXTRA})
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 48
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def test_an_import_that_goes_out_again_says_what_came_in(instruct, tmp_path):
    import_weights(str(instruct), tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "back")
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (instruct, tmp_path / "back"))
    assert after.chat_template == TEMPLATE
    assert after.special_tokens_map == before.special_tokens_map
    assert after.model_max_length == 48
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == GENERATION
    text = "the cat<|user|> sat"
    assert after(text).input_ids == before(text).input_ids
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)


def test_a_conversation_has_the_ids_of_the_template(instruct, tmp_path, capsys):
    import_weights(str(instruct), tmp_path / "run")
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"},
                {"role": "user", "content": "on the <|end|> mat"}]
    wanted = transformers.AutoTokenizer.from_pretrained(instruct).apply_chat_template(
        messages, add_generation_prompt=True)["input_ids"]
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert tokenizer.encode_chat(messages) == wanted
    assert len(tokenizer.encode("<|end|>")) > 1  # outside a chat it is ordinary text
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "the cat"}) + "\n")
    generate.main(["--workdir", str(tmp_path / "run"), "--chat", "--prompts-file", str(file), "--max-new-tokens", "3",
                   "--output", str(tmp_path / "out.jsonl")])
    assert len(capsys.readouterr().out.split("---")) == 3
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["tokens"]) <= 3 for row in rows] == [True, True]


def test_a_model_without_a_template_has_no_chat(tmp_path):
    (tmp_path / "plain").mkdir()
    import_weights(str(checkpoints.write(tmp_path / "plain")), tmp_path / "run")
    with pytest.raises(UserError, match=r"no chat template.*leave out --chat"):
        generate.main(["--workdir", str(tmp_path / "run"), "--chat", "--prompt", "the cat"])


@pytest.fixture
def source(tmp_path) -> Path:
    """A plain checkpoint."""
    (tmp_path / "source").mkdir()
    return checkpoints.write(tmp_path / "source")


def imported(source: Path, out: Path):
    """(notes, parameters) of an import."""
    return import_weights(str(source), out).notes, load_flat(out)[2]


def same(one, other) -> None:
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


def rename(folder: Path, change) -> None:
    safetensors.numpy.save_file({change(name): array for name, array in weights().items()}, folder / SINGLE)


AS_OTHERS_SAVE = {
    "compiled": (lambda folder: rename(folder, lambda name: f"_orig_mod.{name}"), "_orig_mod."),
    "data parallel": (lambda folder: rename(folder, lambda name: f"module.{name}"), "module."),
    "64 bits": (lambda folder: store(folder, **{name: array.astype(np.float64) for name, array in weights().items()}),
                "64 bits"),
    "the head alone": (lambda folder: rename(folder, lambda name: "lm_head.weight" if name == TABLE else name),
                       "lm_head.weight alone"),
}


@pytest.mark.parametrize("case", AS_OTHERS_SAVE)
def test_what_others_save_is_read_with_a_note(case, source, tmp_path):
    _, wanted = imported(source, tmp_path / "plain")
    change, says = AS_OTHERS_SAVE[case]
    change(source)
    notes, found = imported(source, tmp_path / "run")
    same(found, wanted)
    assert len(notes) == 1
    assert says in notes[0]


def test_frequencies_of_any_type_are_no_weight(source, tmp_path):
    store(source, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)})
    assert imported(source, tmp_path / "run")[0] == ()


def test_a_special_token_beyond_the_table_changes_nothing(source, tmp_path):
    _, wanted = imported(source, tmp_path / "plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{number}|>" for number in range(20)]})
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(source)
    _, found = imported(source, tmp_path / "run")
    same(found, wanted)
    assert load_tokenizer(tmp_path / "run" / "tokenizer").vocab_size == 280


def pointer(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


REFUSED = {
    "a pointer": (pointer, ["pointer of Git LFS", "git lfs pull"]),
    "from inside PEFT": (lambda folder: rename(folder, lambda name: f"base_model.model.{name}"),
                         ["base_model.model.", "merge_and_unload"]),
    "reads images": (lambda folder: rename(folder, lambda name: f"language_model.{name}"), ["reads images"]),
    "a classifier": (lambda folder: store(folder, **{"score.weight": np.ones((2, 8), np.float32)}),
                     ["score.weight", "classifier"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_language_model_is_named_with_its_cure(case, source, tmp_path):
    change, says = REFUSED[case]
    change(source)
    with pytest.raises(UserError) as caught:
        import_weights(str(source), tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in says), message


def write_adapter(folder: Path, base: str, **facts) -> dict[str, np.ndarray]:
    """A PEFT adapter of the query's matrix; returns A and B."""
    rng, module = np.random.default_rng(1), QUERY.removesuffix(".weight")
    pair = {"A": rng.normal(size=(2, 8)).astype(np.float32), "B": rng.normal(size=(8, 2)).astype(np.float32)}
    folder.mkdir()
    stored_pair = {f"base_model.model.{module}.lora_{name}.weight": array for name, array in pair.items()}
    safetensors.numpy.save_file(stored_pair, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": base} | facts))
    return pair


def test_an_adapter_is_merged_into_its_base(source, tmp_path):
    _, plain = imported(source, tmp_path / "plain")
    pair = write_adapter(tmp_path / "adapter", str(source))
    notes, found = imported(tmp_path / "adapter", tmp_path / "run")
    path = "backbone/blocks/query/kernel"
    np.testing.assert_allclose(found[path][0], plain[path][0] + (3 * pair["B"] @ pair["A"]).T, rtol=1e-5, atol=1e-5)
    same({**found, path: 0}, {**plain, path: 0})
    assert "is merged into" in notes[0]


@pytest.mark.parametrize(("facts", "says"), [
    ({"base_model_name_or_path": "not/there/at all"}, "not/there/at all"),
    ({"base_model_name_or_path": "."}, "which is an adapter itself"), ({"use_dora": True}, "only plain LoRA"),
    ({"rank_pattern": {"q": 3}}, "rank_pattern"), ({"r": 3}, "is damaged"), ({"r": "2"}, "is damaged")])
def test_an_adapter_that_cannot_be_merged_is_refused(facts, says, source, tmp_path):
    write_adapter(tmp_path / "adapter", str(source), **facts)
    with pytest.raises(UserError, match=says):
        import_weights(str(tmp_path / "adapter"), tmp_path / "run")


def test_an_adapter_of_another_base_is_refused(source, tmp_path):
    store(source, **{QUERY: None})
    write_adapter(tmp_path / "adapter", str(source))
    with pytest.raises(UserError, match=r"no adapter of .*q_proj.weight of shape \(8, 8\), the base has None"):
        import_weights(str(tmp_path / "adapter"), tmp_path / "run")


def test_rows_of_zeros_give_ordinary_gradients(tmp_path):
    flags = runs.imported(tmp_path)
    norms = []
    for name, rows in (("as it is", 0), ("with rows of zeros", 12)):
        table = weights()[TABLE]
        table[:rows] = 0
        source = shutil.copytree(tmp_path / "hf", tmp_path / f"hf {rows}")
        store(source, **{TABLE: table})
        import_weights(str(source), tmp_path / f"import {rows}")
        runs.go(*flags, "--init-from", str(tmp_path / f"import {rows}"), "--workdir", str(tmp_path / name),
                "--tokenizer.kind", "workdir", "--tokenizer.name", str(tmp_path / f"import {rows}"),
                "--train.num-steps", "2", "--train.log-every", "1")
        norms.append(max(row.get("train/grad_norm", 0) for row in rows_of(tmp_path / name / "metrics.jsonl")))
    assert norms[1] < 3 * norms[0]


OTHER_MAJOR = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
"""What differs; the libraries beneath are those of this environment."""
READ = """
import json, sys, numpy as np, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
out = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("the cat sat on the mat. " * 6).input_ids])
    with torch.no_grad():
        out[folder] = [ids[0].tolist(), model(ids).logits[0].tolist()]
json.dump(out, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_the_other_major_version_reads_the_same_model(tmp_path):
    """Every family, exported and read by version 4 of transformers in an environment of its own."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    from test_hf import make

    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "four",
                       *OTHER_MAJOR], check=False).returncode:
        pytest.skip("version 4 of transformers cannot be had here")
    folders = {}
    for name in ("gpt2", "llama llama3", "llama yarn", "llama linear", "qwen2 tied", "qwen3", "mistral windows",
                 "gemma3 linear, biases", "gpt_neox", "gpt_neox in sequence, tied"):
        model = make(name, tmp_path / name / "hf")
        import_weights(str(tmp_path / name / "hf"), tmp_path / name / "run")
        export_weights(tmp_path / name / "run", tmp_path / name / "back")
        folders[str(tmp_path / name / "back")] = model
    script = tmp_path / "read.py"
    script.write_text(READ)
    subprocess.run([sys.executable, script, tmp_path / "out.json", *folders], check=True, timeout=300,
                   env={"PYTHONPATH": str(tmp_path / "four"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"})
    for folder, (ids, logits) in json.loads((tmp_path / "out.json").read_text()).items():
        assert ids == load_tokenizer(Path(folder).parent / "run" / "tokenizer").encode("the cat sat on the mat. " * 6)
        with torch.no_grad():
            wanted = folders[folder](torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(np.array(logits), wanted, atol=1e-4, err_msg=folder)


def test_a_generator_comes_straight_from_a_checkpoint(source, tmp_path):
    import_weights(str(source), tmp_path / "run")
    settings = GenerationConfig(tail_length=1, rate=1.0, max_new_tokens=8)
    one, other = (made.generate(["the cat"], settings) for made in (
        Generator.from_pretrained(str(source)), Generator.from_workdir(tmp_path / "run")))
    assert [sample.tokens for sample in one] == [sample.tokens for sample in other]
    with pytest.raises(UserError, match="does not exist"):
        Generator.from_pretrained("not/there/at all")
