import ast
import dataclasses
import itertools
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokmat_jax.commands import flags as cli
from tokmat_jax.commands import generate
from tokmat_jax.config import Config, DataConfig, GenerationConfig
from tokmat_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def complaint(args):
    with pytest.raises(UserError) as caught:
        cli.parse_config(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_gives_the_start_and_flags_the_rest(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from tokmat_jax.config import *\ndef get_config():\n"
                    "    return Config(workdir='w', model=ModelConfig(num_layers=5))\n")
    config = cli.parse_config(["--model.num-heads", "2", f"--config={path}", "--objective.kind", "ar"])
    assert (config.workdir, config.model.num_layers, config.model.num_heads) == ("w", 5, 2)
    assert config.objective.kind == "ar"
    assert cli.parse_config([]) == Config()


@pytest.mark.parametrize(("args", "says"), [
    (["--model.num-layer", "3"], "unknown option --model.num-layer; nearest: --model.num-layers"),
    (["--objectiv.kind=ar"], "unknown option --objectiv.kind; nearest: --objective.kind"),
    (["--model.num-layers", "x"], "--model.num-layers: invalid literal"),
    (["--objective.kind", "gan"], "Expected one of"),
    (["--maturation.max-tail-length", "0"], "maturation.max_tail_length (K_max) must be at least 1, found 0"),
    (["--maturation.max-tail-length", "256"], "must be smaller than data.seq_len"),
    (["--generation.tail-length", "0"], "generation.tail_length (K) must be at least 1, found 0"),
    (["--generation.tail-length", "256"], "must be smaller than the model's positions by at least 2"),
    (["--model.num-heads", "3"], "must divide model.embed_dim, found 3 and 128"),
    (["--tokenizer.kind", "huggingface"], "tokenizer.name is required for the kinds 'huggingface'"),
    (["--config", "nowhere.py"], "neither a file nor one of the shipped names gpt2_medium, gpt2_small, quickstart, "),
    (["--config"], "neither a file nor"),
])
def test_a_mistake_is_one_line_that_names_it(args, says):
    assert says in complaint(args)


@pytest.mark.parametrize(("args", "field", "value"), [
    (["--prompt", "-hello"], "prompt", ("-hello",)), (["--prompt=-hello", "--prompt", "-"], "prompt", ("-hello", "-")),
    (["--prompt", "--hello there", "--seed", "3"], "prompt", ("--hello there",)),
    (["--prompt=--stream"], "prompt", ("--stream",)), (["--prompt", "--"], "prompt", ("--",)),
    (["--steering-words", "-a", "b"], "generation.steering_words", ("-a", "b")),
    (["--compare", "-a=b"], "compare", ("-a=b",)),
    (["--steering_words", "-5"], "generation.steering_words", ("-5",)),
    (["--output", "-o.jsonl"], "output", "-o.jsonl"),
    (["--data.separator", "---"], "data", DataConfig(separator="---")),
])
def test_a_text_may_begin_with_what_flags_begin_with(args, field, value):
    parsed = cli.parse(Config, args) if field == "data" else cli.parse(generate.Args, ["--workdir", "x", *args])
    assert operator.attrgetter(field)(parsed) == value


@pytest.mark.parametrize(("args", "says"), [
    (["--prompt", "--stream"], "for the text '--stream' write --prompt=--stream"),
    (["--prompt", "--seed=3"], "for the text '--seed=3' write --prompt=--seed=3"),
    (["--seed", "--prompt", "x"], "Missing value for argument '--seed'. Expected 1 values."),
    (["--prompt", "x", "--stream", "-x"], "unknown option -x"), (["--prompt"], "Expected 1 values."),
])
def test_a_text_that_is_taken_for_a_flag_is_told_how_to_be_one(args, says):
    with pytest.raises(UserError) as caught:
        cli.parse(generate.Args, ["--workdir", "x", *args])
    assert says in str(caught.value)
    assert str(caught.value).endswith(says) or says.startswith("unknown")


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=str)
@pytest.mark.parametrize(("flags", "says"), [
    (("--model.num-layers", "x"), "invalid literal for int"),
    (("--maturation.max-tail-length", "0"), "must be at least 1, found 0"),
    (("--objective.kind", "gan"), "Expected one of"),
])
def test_colours_and_plain_boxes_lose_no_message(environment, flags, says):
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=CONFIGS.parent, env=os.environ | environment,
                          capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "says"), [
    ("def get_config(): return 3", "must define get_config()"),
    ("x = 3", "must define get_config()"),
    ("import nothing_of_that_name", "cannot be run: ModuleNotFoundError"),
    ("from tokmat_jax.config import *\ndef get_config(): return Config(model=ModelConfig(num_layers=0))",
     "model.num_layers must be positive"),
])
def test_a_broken_config_file_is_one_line(tmp_path, text, says):
    (tmp_path / "c.py").write_text(text)
    assert says in complaint(["--config", str(tmp_path / "c.py")])


def test_help_documents_the_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_config(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--maturation.max-maturity" in shown
    assert "maturity of the front slot" in shown


def test_every_setting_of_generation_is_a_flag_without_prefix(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    words = capsys.readouterr().out.split()
    assert {f"--{one.name.replace('_', '-')}" for one in dataclasses.fields(GenerationConfig)} <= set(words)
    assert "softmax(cos/τ)." in words


def test_every_field_says_what_it_is():
    files = (CONFIGS.parent / "tokmat_jax" / "config").glob("*.py")
    classes = [node for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert len(classes) > 12
    for section in (node for node in classes if node.name not in ("Config", "Section")):
        for field, following in itertools.pairwise(section.body):
            if isinstance(field, ast.AnnAssign):
                said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert said, f"{section.name}.{ast.unparse(field.target)}"


@pytest.mark.usefixtures("optax_promotion")
def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    def main(args):
        raise UserError("the thing is wrong")

    with pytest.raises(SystemExit) as stop:
        cli.run_script(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the thing is wrong\n"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_loads(path):
    assert cli.load_config_file(path).workdir == f"runs/{path.stem}"
