"""A matured run handed to transformers and taken back, and what an import is good for."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import checkpoints
from tokmat_jax.commands import generate, train
from tokmat_jax.commands.hf import main
from tokmat_jax.errors import UserError
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf.convert import SIDECAR, import_weights, load_flat
from tokmat_jax.storage.workdir import load_config
from tokmat_jax.view.terminal import visible

PROMPTS = ["the cat", "who sat by the", "a dog ran to the sea. the"]


@pytest.fixture(scope="module")
def exported(runs_dir, tmp_path_factory) -> Path:
    """The checkpoint of the maturation run."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    main(["export", str(runs_dir / "run"), str(folder)])
    return folder


def test_transformers_writes_what_the_exported_run_commits_with_one_slot_at_rate_one(runs_dir, exported):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(exported) for auto in (AutoModelForCausalLM, AutoTokenizer))
    generator = Generator.from_workdir(runs_dir / "run")
    settings = dataclasses.replace(generator.config.generation, tail_length=1, rate=1.0, tail_noise=0.0,
                                   guidance_scale=1.0, max_new_tokens=24)
    for sample in generator.generate(PROMPTS, settings):
        begin = torch.tensor([tokenizer(sample.prompt).input_ids])
        with torch.no_grad():
            out = model.generate(begin, attention_mask=torch.ones_like(begin), do_sample=False, max_new_tokens=24,
                                 pad_token_id=tokenizer.eos_token_id)
        assert sample.tokens == out[0, begin.shape[1]:].tolist()
        assert len(set(sample.tokens)) > 1


def test_an_exported_run_comes_back_bit_for_bit(runs_dir, exported, tmp_path):
    main(["import", str(exported), str(tmp_path / "back")])
    before, after = load_flat(runs_dir / "run"), load_flat(tmp_path / "back")
    assert after[0] == dataclasses.replace(before[0], workdir=str(tmp_path / "back"))
    assert after[1].same_ids(before[1])
    assert before[2].keys() == after[2].keys()
    for path, array in before[2].items():
        np.testing.assert_array_equal(array, after[2][path], err_msg=path)
    again, first = (Generator.from_workdir(folder).generate(PROMPTS, seed=3)
                    for folder in (tmp_path / "back", runs_dir / "run"))
    assert again == first


def spoil_derived(folder: Path) -> None:
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    found["transformer.wte.weight"][5, 3] += 1e-3
    safetensors.numpy.save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def drop_own(folder: Path) -> None:
    path = folder / SIDECAR / "weights.safetensors"
    found = safetensors.numpy.load_file(path)
    del found["table"]
    safetensors.numpy.save_file(found, path)


def cut_own(folder: Path) -> None:
    path = folder / SIDECAR / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def edit_run(folder: Path, change) -> None:
    path = folder / SIDECAR / "run.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))


SPOILT = {
    "derived weight changed": (spoil_derived, ["weight transformer.wte.weight was changed", "delete that folder"]),
    "own weight missing": (drop_own, [f"{SIDECAR}/weights.safetensors", "table"]),
    "own weights cut": (cut_own, [SIDECAR, "is damaged"]),
    "no config": (lambda folder: edit_run(folder, lambda run: run.pop("config")), [SIDECAR, "is damaged", "config"]),
    "unknown field": (lambda folder: edit_run(folder, lambda run: run["config"]["model"].update(width=3)),
                      ["run.json", "unknown field 'width'"]),
    "another shape": (lambda folder: edit_run(folder, lambda run: run["config"]["model"].update(mlp_dim=40)),
                      ["mlp.c_fc.weight", "has shape (16, 64)", "(16, 40)"]),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / SIDECAR / "tokenizer"), ["no usable tokenizer"]),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_sidecar_that_does_not_go_with_its_weights_is_refused(case, exported, tmp_path):
    spoil, says = SPOILT[case]
    source = shutil.copytree(exported, tmp_path / "source")
    spoil(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        import_weights(str(source), tmp_path / "out")
    for part in says:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def plain(exported, tmp_path_factory) -> Path:
    """An import of the same checkpoint without its sidecar: a language model over a raw, untied table."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(exported, folder / "hf", ignore=shutil.ignore_patterns(SIDECAR))
    import_weights(str(folder / "hf"), folder / "run")
    return folder / "run"


def test_without_its_sidecar_it_is_a_language_model_that_writes_the_same(runs_dir, plain):
    config, _, flat = load_flat(plain)
    assert (config.objective.kind, config.table.geometry, config.table.tied) == ("ar", "raw", False)
    assert "readout" in flat
    matured = Generator.from_workdir(runs_dir / "run")
    settings = dataclasses.replace(matured.config.generation, tail_length=1, rate=1.0, tail_noise=0.0,
                                   guidance_scale=1.0, max_new_tokens=24)
    ours = [sample.tokens for sample in matured.generate(PROMPTS, settings)]
    assert [sample.tokens for sample in Generator.from_workdir(plain).generate(PROMPTS, settings)] == ours


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """An import whose table has rows of all lengths and is its own readout."""
    folder = tmp_path_factory.mktemp("tied")
    import_weights(str(checkpoints.write(folder)), folder / "run")
    return folder / "run"


def test_the_sphere_counts_the_tokens_that_change(tied, tmp_path, capsys):
    main(["sphere", str(tied), str(tmp_path / "sphere"), "--max-new-tokens", "16", "--prompt", PROMPTS[0], "--prompt",
          PROMPTS[1]])
    printed = capsys.readouterr().out.splitlines()
    raw, moved = Generator.from_workdir(tied), Generator.from_workdir(tmp_path / "sphere")
    assert (moved.config.table.geometry, raw.config.table.geometry) == ("sphere", "raw")
    settings = dataclasses.replace(raw.config.generation, max_new_tokens=16)
    changed, total = 0, 0
    for prompt, line in zip(PROMPTS[:2], printed, strict=False):
        before, after = (one.generate([prompt], settings)[0].tokens for one in (raw, moved))
        ids = raw.tokenizer.encode(prompt)
        # One token at a time, behind the text over the raw table.
        once = dataclasses.replace(settings, max_new_tokens=1)
        chosen = [moved.generate([[*ids, *before[:index]]], once)[0].tokens[0] for index in range(len(before))]
        differ = sum(one != other for one, other in zip(before, chosen, strict=True))
        agreed = next((index for index, (one, other) in enumerate(zip(before, after, strict=False)) if one != other),
                      min(len(before), len(after)))
        assert line.startswith(prompt)
        assert line.endswith(
            f"{differ} of {len(before)} tokens change, the first {agreed} are written alike")
        changed, total = changed + differ, total + len(before)
    assert 0 < changed < total
    said = f"on the sphere {changed} of {total} tokens ({changed / total:.1%}) of the greedy text change"
    assert printed[2] == f"{tmp_path / 'sphere'}: {said}"


def test_the_sphere_leaves_nothing_where_it_cannot_be_measured(plain, runs_dir, tmp_path):
    for args, says in [
        (["sphere", str(plain), str(tmp_path / "out"), "--max-new-tokens", "4000"], "needs 40"),
        (["sphere", str(runs_dir / "run"), str(tmp_path / "out")], "has no raw table"),
        (["sphere", str(runs_dir / "ar"), str(tmp_path / "out")], "has no raw table"),
        (["sphere", str(plain), str(plain)], "already exists"),
    ]:
        with pytest.raises(UserError, match=says):
            main(args)
        assert not list(tmp_path.iterdir())


def test_an_import_generates_and_matures_and_is_not_trained_into(plain, runs_dir, tmp_path, capsys):
    generate.main(["--workdir", str(plain), "--prompt", "the cat", "--max-new-tokens", "6"])
    want = Generator.from_workdir(plain)
    settings = dataclasses.replace(want.config.generation, max_new_tokens=6)
    assert visible(want.generate(["the cat"], settings)[0].text) in capsys.readouterr().out

    stay = {"data.source": f"files:{runs_dir}/corpus.txt", "data.seq-len": 48, "data.holdout": 0.2,
            "data.prepared-dir": tmp_path / "prepared", "train.batch-size": 4, "train.num-steps": 2,
            "train.eval-batches": 1, "train.num-samples": 0, "mesh.data": 4, "maturation.max-tail-length": 8}
    flags = [word for name, value in stay.items() for word in (f"--{name}", str(value))]
    before = sorted((path, path.stat().st_mtime_ns) for path in plain.rglob("*"))
    with jax.numpy_dtype_promotion("standard"):
        train.main([*flags, "--init-from", str(plain), "--workdir", str(tmp_path / "matured")])
        with pytest.raises(UserError, match="holds imported weights, which training would replace"):
            train.main([*flags, "--init-from", str(plain), "--workdir", str(plain)])
    assert sorted((path, path.stat().st_mtime_ns) for path in plain.rglob("*")) == before
    config = load_config(tmp_path / "matured")
    assert (config.objective.kind, config.table.geometry, config.init_from) == ("maturation", "sphere", str(plain))
    assert Generator.from_workdir(tmp_path / "matured").generate(["the cat"], settings)[0].tokens
