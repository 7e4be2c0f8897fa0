"""Shipped files are found by name, from any folder, and a path that exists wins."""

import pytest

from tokmat_jax import __version__
from tokmat_jax.commands import experiment, main, shipped
from tokmat_jax.commands.flags import load_config_file, parse_config
from tokmat_jax.errors import UserError


def test_a_shipped_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config_file("quickstart").workdir == "runs/quickstart"
    assert parse_config(["--config", "gpt2_small", "--train.seed", "3"]).workdir == "runs/gpt2_small"


def test_a_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text(
        "from tokmat_jax.config import Config\n\ndef get_config():\n    return Config(workdir='mine')\n")
    assert load_config_file("quickstart").workdir == "mine"


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"--config: 'quickstrat' is neither .* gpt2_medium, gpt2_small, quickstart, "):
        load_config_file("quickstrat")
    with pytest.raises(UserError, match=r"--file: 'mine\.toml' is neither a file nor one of the shipped names experim"):
        experiment.main(["--file", "mine.toml"])


def test_an_installed_package_reads_its_own_copy(tmp_path, monkeypatch):
    (tmp_path / "site" / "tokmat_jax" / "configs").mkdir(parents=True)
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "site" / "tokmat_jax")
    assert shipped.folder() == tmp_path / "site" / "tokmat_jax" / "configs"


def test_the_experiments_and_their_base_need_no_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment.main([])
    assert "train_as_decoded" in capsys.readouterr().out
    known = experiment.read_experiments(shipped.find("experiments", ".toml", "--file"))
    assert load_config_file(known["first_recipe"].base).workdir == "runs/quickstart"


def test_the_version_is_the_package_s(capsys):
    main.main(["--version"])
    assert capsys.readouterr().out == f"tokmat {__version__}\n"
