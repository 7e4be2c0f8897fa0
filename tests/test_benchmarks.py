"""The benchmarks at shapes of a second: what they compare agrees, and what they print is well formed. No stopwatch."""

import dataclasses
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

from tokmat_jax.commands.flags import load_config_file
from tokmat_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from tokmat_jax.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SHAPE = ("--embed-dim", "16", "--num-layers", "2", "--num-heads", "2", "--vocab-size", "61", "--tail-length", "4")


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark as it is when it runs: from its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def told(capsys):
    """The line of JSON that follows a card, and the card."""

    def read():
        *card, last = capsys.readouterr().out.splitlines()
        return json.loads(last), "\n".join(card)

    return read


def well_formed(ratio):
    return 0.0 < ratio["low"] <= ratio["median"] <= ratio["high"] < math.inf


def tiny_flags(decoding, **fields):
    return decoding.Args(embed_dim=16, num_layers=2, num_heads=2, vocab_size=61, max_positions=64, tail_length=4,
                         history=16, naive_tokens=4, prompt_tokens=5, new_tokens=6, rounds=1, **fields)


def test_cached_and_naive_commit_the_same_tokens(script):
    decoding = script("decoding")
    flags = tiny_flags(decoding)
    tokens = decoding.cached(flags)()
    assert tokens == decoding.naive(flags)()
    assert len(tokens) == len(decoding.whole(flags)()) == flags.naive_tokens


def test_steps_behind_a_prompt_are_those_of_generate(script):
    decoding = script("decoding")
    flags = tiny_flags(decoding)
    generator, prompt, settings = decoding.behind_history(flags)
    steps = decoding.Stepping(generator, [prompt, prompt[:9]], settings)
    expected = [one.tokens for one in generator.generate([prompt, prompt[:9]], settings)]
    for _ in range(2):  # a round leaves the next one the same work
        assert steps().T.tolist() == expected


@pytest.mark.parametrize("name", ["k1", "k1_batch_8", "k", "k_guided"])
def test_contestants_write_the_same_number_of_tokens(script, name):
    decoding = script("decoding")
    flags = tiny_flags(decoding)
    rows = decoding.CONTESTANTS[name](flags)()
    assert [len(row) for row in rows] == [flags.new_tokens] * (8 if name.endswith("8") else 1)


def test_torch_writes_as_many(script):
    pytest.importorskip("torch")
    decoding = script("decoding")
    flags = tiny_flags(decoding)
    assert [len(row) for row in decoding.CONTESTANTS["torch_batch_8"](flags)()] == [flags.new_tokens] * 8


def test_decoding_card(script, told, monkeypatch):
    decoding = script("decoding")
    asked = []

    def alternate(path, names, settings, rounds):
        asked.append((Path(path).name, names, settings))
        return {name: {"seconds": [1.0 + len(name)] * rounds, "peak_bytes": 1} for name in names}

    monkeypatch.setattr(decoding, "alternate", alternate)
    decoding.main([*SHAPE, "--rounds", "2"])
    found, card = told()
    assert set(found["ratios"]) == {"cached_to_naive", "cached_to_whole", "k1_to_torch", "k1_to_torch_batch_8",
                                    "k_times_k1", "guided_times_k"}
    assert all(map(well_formed, found["ratios"].values()))
    assert found["ratios"]["guided_times_k"]["median"] == 9 / 2
    assert "not reached" in card
    assert "jax" in found["machine"]
    assert {name for _, names, _ in asked for name in names} == set(decoding.CONTESTANTS)
    # What is passed on is understood again.
    again = decoding.parse(decoding.Args, [*asked[0][2], "--contestant", "k"])
    assert again == decoding.parse(decoding.Args, [*SHAPE, "--rounds", "2", "--contestant", "k"])


def test_contestants_take_turns_in_processes_of_their_own(script):
    decoding, side_by_side = script("decoding"), script("side_by_side")
    flags = tiny_flags(decoding)
    found = side_by_side.alternate(str(FOLDER / "decoding.py"), ["k1"], side_by_side.words_of(flags), 2)
    assert len(found["k1"]["seconds"]) == 2
    assert found["k1"]["peak_bytes"] > 0


def test_turns_alternate_after_a_round_that_is_not_timed(script):
    side_by_side = script("side_by_side")
    order = []
    found = side_by_side.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert all(len(one["seconds"]) == 2 for one in found.values())
    assert side_by_side.ratio({"f": {"seconds": [1, 2, 4]}, "s": {"seconds": [2, 6, 20]}}, "f", "s")["median"] == 3.0


def test_growth_with_the_history(script):
    growth = script("growth")
    flags = growth.Args(embed_dim=16, num_layers=2, num_heads=2, vocab_size=61, tail_length=4, shortest=16, longest=64,
                        new_tokens=4, rounds=2)
    rows = growth.over_history(flags)["rows"]
    assert [row["history"] for row in rows] == growth.histories(flags) == [16, 64]
    assert all(row["history"] + 4 <= row["capacity"] for row in rows)
    assert rows[0]["growth_by_operations"] == rows[0]["growth"]["median"] == 1.0
    assert rows[1]["growth_by_operations"] > 1.0
    assert 0.0 < rows[0]["attention_share"] < rows[1]["attention_share"] < 1.0
    assert growth.histories(growth.Args()) == [64, 256, 1024]


def test_operations_of_a_step_by_hand(script):
    growth = script("growth")
    model = ModelConfig(embed_dim=4, num_layers=3, num_heads=2)
    # 4 d² of attention and 8 d² of the MLP in each block, 2 d² of conditioning, d² of the head.
    assert growth.step_weights(model) == 3 * 12 * 16 + 3 * 16
    assert growth.step_flops(model, 10, 5, 20) == {"attention": 4 * 3 * 4 * 5 * 25, "rest": 2 * 624 * 5 + 2 * 10 * 4}


def test_training_over_devices(script, monkeypatch):
    growth = script("growth")
    monkeypatch.setattr(growth, "DEVICES", (1, 2))
    rows = growth.over_devices(growth.Args(steps=2))
    assert [row["devices"] for row in rows] == [1, 2]
    assert [row["compilations"] for row in rows] == [1, 1]
    assert max(row["off"] for row in rows) <= growth.ACCURACY
    assert all(len(row["losses"]) == 2 for row in rows)


def test_a_process_pretends_to_have_devices(script, monkeypatch):
    growth = script("growth")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to= --xla_force_host_platform_device_count=4")
    assert growth.pretended(8)["XLA_FLAGS"] == "--xla_dump_to= --xla_force_host_platform_device_count=8"


@pytest.fixture
def corpus_config(tmp_path):
    """A file with a config on a corpus of a few sentences."""
    import runs

    corpus = runs.write_corpus(tmp_path)
    path = tmp_path / "config.py"
    path.write_text(
        "from tokmat_jax.config import *\n\n\n"
        "def get_config():\n"
        f"    return Config(data=DataConfig(source='files:{corpus}', seq_len=48, holdout=0.2, "
        f"prepared_dir='{tmp_path}/prepared'), tokenizer=TokenizerConfig(kind='bytes'), "
        "model=ModelConfig(embed_dim=16, num_layers=1, num_heads=2), train=TrainConfig(batch_size=4))\n")
    return path


@pytest.mark.usefixtures("optax_promotion")
def test_reading_card(script, told, corpus_config):
    data_reading = script("data_reading")
    data_reading.main(["--config", str(corpus_config), "--batches", "40", "--steps", "2", "--rounds", "2"])
    found, card = told()
    assert well_formed(found["ratio"])
    assert set(found["tokens_per_second"]) == {"reading", "training"}
    assert "aim 20 ×" in card
    rates = found["tokens_per_second"]
    assert math.isclose(rates["reading"] / rates["training"], 40 / 2 * np.median(found["found"]["training"]["seconds"])
                        / np.median(found["found"]["reading"]["seconds"]))
    assert load_config_file(corpus_config).train.batch_size == 4


def test_accelerator_refuses_a_cpu(script):
    with pytest.raises(UserError, match=r"^needs an accelerator, found cpu$"):
        script("accelerator").main([])
    done = subprocess.run([sys.executable, FOLDER / "accelerator.py"], capture_output=True, text=True, check=False,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stderr, done.stdout) == (2, "error: needs an accelerator, found cpu\n", "")


def test_roofline_by_hand(script):
    accelerator = script("accelerator")
    model = ModelConfig(embed_dim=4, num_layers=3, num_heads=2, dtype="bfloat16")
    found = accelerator.roofline(model, 10, 6, 5, 20.0, bandwidth=1e3, peak=1e9)
    # 2 bytes per weight, 4 per number of the table, 2 per key and per value.
    assert found.bytes == 2 * 624 + 4 * 10 * 4 + 2 * 2 * 6 * 20 * 3 * 4
    assert found.flops == 2 * 624 * 6 * 5 + 2 * 10 * 4 * 6 + 4 * 3 * 4 * 5 * 25 * 6
    assert found.seconds == found.bytes / 1e3
    assert accelerator.roofline(model, 10, 6, 5, 20.0, bandwidth=1e9, peak=1e3).seconds == found.flops / 1e3


def test_training_operations_by_hand(script):
    accelerator = script("accelerator")
    config = Config(data=DataConfig(seq_len=32), model=ModelConfig(embed_dim=4, num_layers=3, num_heads=2),
                    objective=ObjectiveConfig(num_negatives=7))
    found = accelerator.training_flops(config, 1000)
    assert (found["weights"], found["negatives"], found["attention"]) == (6 * 624, 6 * 7 * 4, 12 * 3 * 32 * 4)
    assert found["total"] == sum(found[name] for name in ("weights", "negatives", "attention"))
    assert found["causal"] == found["total"] - found["attention"] * (1 - 33 / 64)


def small_accelerator_config():
    return Config(data=DataConfig(seq_len=32), maturation=dataclasses.replace(Config().maturation, max_tail_length=8),
                  model=ModelConfig(embed_dim=16, num_layers=2, num_heads=2, dtype="bfloat16"),
                  objective=ObjectiveConfig(num_negatives=8), train=TrainConfig(batch_size=4))


@pytest.mark.usefixtures("optax_promotion")  # which lets bfloat16 meet float32, too
def test_measures_of_an_accelerator(script, capsys):
    accelerator = script("accelerator")
    peak = accelerator.matmul_peak((16, 32), 1, 2)
    assert set(peak["by_size"]) == {"16", "32"}
    assert peak["flops"] == max(peak["by_size"].values()) > 0
    assert accelerator.copy_bandwidth(1024, 1, 2) > 0
    config = small_accelerator_config()
    row = accelerator.measure_decoding(config, 61, 2, 3, 8, 4, 1, bandwidth=1e9, peak=1e9)
    assert math.isclose(row["times_roofline"], row["seconds"] / row["roofline"]["seconds"])
    assert row["roofline"] == dataclasses.asdict(accelerator.roofline(config.model, 61, 2, 3, 9.5, 1e9, 1e9))
    accelerator.print_decoding(row)
    assert f"{row['times_roofline']:.2f} ×" in capsys.readouterr().out
    json.dumps([peak, row])


@pytest.mark.usefixtures("optax_promotion")
def test_training_of_an_accelerator(script, capsys):
    accelerator = script("accelerator")
    found = accelerator.measure_training(small_accelerator_config(), 61, ("xla",), 1, 2, peak=1e9)
    share = found["tokens_per_second"]["xla"] * found["flops_per_token"]["total"] / (1e9 * jax.device_count())
    assert math.isclose(found["share"]["xla"], share)
    accelerator.print_training(found)
    assert "tokens/s" in capsys.readouterr().out
    json.dumps(found)


def test_the_class_that_is_trained(script):
    accelerator = script("accelerator")
    config = accelerator.config_of(accelerator.Args())
    assert accelerator.with_attention(config, "cudnn").compute.attention == "cudnn"
    assert 300e6 < accelerator.training_flops(config, 50_257)["weights"] / 6 < 310e6


def test_a_recording_shows_what_was_asked_and_said_in_order(script, tmp_path):
    talks = [sys.executable, "-c", "import time; print('one <b> │'); time.sleep(0.3); print(chr(27) + 'x' * 150)"]
    script("recording").main([str(tmp_path / "a.svg"), shlex.join(talks)])
    rows = ET.fromstring((tmp_path / "a.svg").read_text()).findall("{http://www.w3.org/2000/svg}text")
    when = [float(row.get("style").removeprefix("animation-delay: ").removesuffix("s")) for row in rows]
    assert rows[0].get("class") == "asked"
    assert [row.text for row in rows if row.get("class") == "said"][:2] == ["one <b> │", "�" + "x" * 99]
    assert when == sorted(when)
    assert when[-1] - when[-3] >= 0.3
    with pytest.raises(UserError, match="ended with 3"):
        script("recording").main([str(tmp_path / "b.svg"), shlex.join([sys.executable, "-c", "exit(3)"])])
    assert not (tmp_path / "b.svg").exists()
