"""A run on the Hugging Face hub: its export, with `maturation/` in it, and a model card."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from tokmat_jax.config import Config
from tokmat_jax.errors import UserError, one_line
from tokmat_jax.hf.convert import export_weights
from tokmat_jax.storage.workdir import load_config

_CARD = """---
library_name: tokmat-jax
pipeline_tag: text-generation
tags: [token-maturation]
---
# {name}

{what} `transformers` loads it as a {model_type} model; {maturation}

```python
from tokmat_jax import Generator

for sample in Generator.from_pretrained("{name}").generate(["In the beginning"]):
    print(sample.text)
```
{report}"""
_MATURED = ("A language model that predicts vectors and commits tokens late "
            "([Token Maturation](https://arxiv.org/abs/2601.04854)).")
_PLAIN = "An autoregressive language model."


def model_card(name: str, config: Config, model_type: str, report: str = "") -> str:
    """The README of the repository `name`; `report` is Markdown that follows."""
    matured = config.objective.kind == "maturation"
    return _CARD.format(
        name=name, what=_MATURED if matured else _PLAIN, model_type=model_type,
        maturation="what that has no place for, the liquid tail, is in the folder `maturation`." if matured
        else "its config for tokmat-jax is in the folder `maturation`.",
        report=f"\n{report.strip()}\n" if report else "")


def _read(report: Path) -> str:
    try:
        return report.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {report}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{report} is not UTF-8: byte {error.start}") from None


def push_to_hub(
    workdir: Path, name: str, private: bool = False, dtype: str | None = None, report: Path | None = None
) -> str:
    """Exports the run in `workdir` and uploads it as `name` (OWNER/NAME); returns its address.

    `report` is a Markdown file for the model card, such as that of a report card. Raises UserError as `export_weights`
    does, and if the hub refuses or cannot be reached.
    """
    found = "" if report is None else _read(report)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "export")
        facts = export_weights(workdir, folder, dtype)
        card = model_card(name, load_config(workdir), facts["model_type"], found)
        (folder / "README.md").write_text(card, encoding="utf-8")
        try:
            address = HfApi().create_repo(name, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a tokmat-jax model")
        except Exception as error:
            raise UserError(f"{name!r} could not be uploaded to the hub: {one_line(error)}; log in with `hf auth "
                            f"login`, or set HF_TOKEN to a token that may write there") from None
    return str(address)
