"""Decoding: cached against naive, ours against `transformers` in torch, and the cost of a tail and of guidance.

    pip install -e '.[parity]' && python benchmarks/decoding.py

All contestants use the same shape (by default GPT-2 small with random weights), tokens and machine, in float32. They
take turns, each in its own process; a line of JSON follows the card.

Cached and naive both continue from an existing history: the pass over the prompt, which the naive decoder never makes
separately, is in neither time. The naive decoder (tokmat_jax/generation/reference.py) gets a jitted forward that pads
its sequences to one length, so that it compiles once and not at every step. It also compares all K slots to the
vocabulary although only the front is needed. `whole` avoids that, too: one compiled step that runs the whole sequence
again and reads only the front.

The other comparisons are of whole generations, prompt included, with the same number of tokens on both sides.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import alternate, machine, median, print_ratio, ratio, serve, words_of

from tokmat_jax.commands.flags import parse, run_script
from tokmat_jax.config import Config, DataConfig, GenerationConfig, ModelConfig
from tokmat_jax.generation.batches import make_batch, sample_key
from tokmat_jax.generation.generator import Generator
from tokmat_jax.generation.reference import generate_by_reference
from tokmat_jax.keys import seed_key
from tokmat_jax.method.algorithm import Record
from tokmat_jax.method.table import look_up
from tokmat_jax.method.tail import Tail
from tokmat_jax.model.attention import history_mask
from tokmat_jax.model.backbone import Forward, Params, make_forward, unstack_blocks
from tokmat_jax.model.params import init_params


@dataclass(frozen=True)
class Args:
    """Time decoders side by side."""

    embed_dim: int = 768
    """Width."""
    num_layers: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads."""
    vocab_size: int = 50_257
    """V."""
    max_positions: int = 1024
    """Positions of the model."""
    tail_length: int = 16
    """K."""
    history: int = 256
    """S, committed positions before a round of cached and naive."""
    naive_tokens: int = 16
    """Tokens per round of cached and naive."""
    prompt_tokens: int = 16
    """Ids in the prompt of the others."""
    new_tokens: int = 48
    """Tokens per round of the others."""
    rounds: int = 5
    """Rounds per contestant."""
    torch: bool = True
    """Include `transformers`."""
    contestant: str | None = None
    """Internal: passed from the benchmark to its processes."""


class Numbers:
    """A tokenizer whose tokens are numbers; no token ends a sample before its budget."""

    end_of_text = -1
    ends = ()
    prefix = ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def split(self, before: Sequence[int], new: Sequence[int]) -> tuple[str, str]:
        return self.decode(before), "".join(f" {token}" for token in new)


def make_generator(config: Config, vocab_size: int) -> Generator:
    """A Generator with random weights, with one parameter tree per block, as after loading a run."""
    params = jax.jit(lambda key: init_params(key, config, vocab_size))(seed_key(0))
    params["backbone"] = jax.jit(unstack_blocks)(params["backbone"])
    return Generator(config, params, Numbers(vocab_size))  # pyright: ignore[reportArgumentType]


def prompts_of(vocab_size: int, batch_size: int, length: int) -> list[list[int]]:
    """Random ids."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch_size, length)).tolist()


class Stepping:
    """The steps of `Generator.generate` after prompts that were already read: `self()` runs them all in one scan."""

    def __init__(self, generator: Generator, prompts: list[list[int]], settings: GenerationConfig):
        self._generator, self._count = generator, settings.max_new_tokens
        self._state, self._tail = generator._start(generator.rows(prompts, settings), settings, 0, None)

    @property
    def capacity(self) -> int:
        """Positions of the history, including unused ones."""
        return max(layer.capacity for layer in self._state.memory)

    def __call__(self) -> np.ndarray:
        """Tokens [steps, B]."""
        # `step`, since `advance` would donate the state from which every round starts.
        ours = self._generator
        _, step = ours.programs.step(ours.backbone, ours.vocabulary, self._state, self._tail, num_steps=self._count,
                                     record=Record())
        return np.asarray(step.tokens)[:, :, 0]


def config_of(flags: Args) -> Config:
    """The model that `flags` describe."""
    return Config(data=DataConfig(seq_len=flags.max_positions), model=ModelConfig(
        embed_dim=flags.embed_dim, num_layers=flags.num_layers, num_heads=flags.num_heads))


def behind_history(flags: Args) -> tuple[Generator, list[int], GenerationConfig]:
    """The state from which cached, naive and whole continue: generator, ids of the history, and settings."""
    prompt = prompts_of(flags.vocab_size, 1, flags.history)[0]
    settings = GenerationConfig(tail_length=flags.tail_length, max_new_tokens=flags.naive_tokens)
    return make_generator(config_of(flags), flags.vocab_size), prompt, settings


def cached(flags: Args) -> Callable[[], list[int]]:
    """The library's cached steps."""
    generator, prompt, settings = behind_history(flags)
    steps = Stepping(generator, [prompt], settings)

    def work() -> list[int]:
        return steps()[:, 0].tolist()

    return work


def padded(forward: Forward, size: int) -> Forward:
    """`forward` over sequences padded to `size`. Padding comes last and attention is causal, so it has no effect."""
    compiled = jax.jit(forward)

    def fill(params: Params, z, maturity, tail_length, positions, mask):
        length = z.shape[1]
        room = size - length
        z = jnp.pad(z, ((0, 0), (0, room), (0, 0)))
        maturity, tail_length, positions = (
            jnp.pad(x, ((0, 0), (0, room))) for x in (maturity, tail_length, positions))
        mask = jnp.pad(mask, ((0, 0), (0, room), (0, room))) | jnp.eye(size, dtype=bool)[None]
        prediction, live = compiled(params, z, maturity, tail_length, positions, mask)
        return prediction[:, :length], live

    return fill


def most_positions(flags: Args) -> int:
    """The longest sequence of the naive decoder."""
    return flags.history + flags.naive_tokens - 1 + flags.tail_length


def naive(flags: Args) -> Callable[[], list[int]]:
    """The naive Algorithm 1, with the same noise."""
    generator, prompt, settings = behind_history(flags)
    tail, key = generator._tail(settings, None), key_of(generator, prompt, settings)
    forward = padded(make_forward(generator.config), most_positions(flags))
    model = functools.partial(forward, generator.backbone)

    def work() -> list[int]:
        return generate_by_reference(model, generator.vocabulary, prompt, flags.naive_tokens, key, tail, ())[0]

    return work


def key_of(generator: Generator, prompt: list[int], settings: GenerationConfig) -> jax.Array:
    """The key of the noise in the library's sample of `prompt`."""
    rows = generator.rows([prompt], settings)
    batch = make_batch(rows, settings.max_new_tokens, 0, generator.config.max_positions, 0)
    return sample_key(jnp.asarray(batch.names[0]))


def whole(flags: Args) -> Callable[[], list[int]]:
    """The minimal work per token of a decoder without a cache, repeated for each token: the whole sequence through the
    model, and the front against the vocabulary. The output is not meaningful text."""
    generator, prompt, settings = behind_history(flags)
    size, forward = most_positions(flags), make_forward(generator.config)
    tail: Tail = generator._tail(settings, None)
    ids = np.resize(prompt, size)

    @jax.jit
    def front(params, vocabulary, ids):
        maturity = jnp.concatenate([jnp.ones(size - flags.tail_length), tail.maturity])[None]
        mask = history_mask(size, jnp.array([flags.history]), jnp.array([False]))
        prediction, _ = forward(params, look_up(vocabulary.table, ids)[None], maturity, jnp.array([flags.tail_length]),
                                jnp.arange(size)[None], mask)
        return jnp.argmax(vocabulary.readout @ prediction[0, -flags.tail_length])

    return lambda: [int(front(generator.backbone, generator.vocabulary, ids)) for _ in range(flags.naive_tokens)]


def ours(flags: Args, tail_length: int, batch_size: int, guidance_scale: float = 1.0) -> Callable[[], list[list[int]]]:
    """Whole generations of the library."""
    generator = make_generator(config_of(flags), flags.vocab_size)
    prompts = prompts_of(flags.vocab_size, batch_size, flags.prompt_tokens)
    settings = GenerationConfig(tail_length=tail_length, max_new_tokens=flags.new_tokens,
                                guidance_scale=guidance_scale)
    return lambda: [one.tokens for one in generator.generate(prompts, settings, batch_size=batch_size)]


def in_torch(flags: Args, batch_size: int) -> Callable[[], list[list[int]]]:
    """Whole generations of GPT-2 in `transformers`, greedy and with its cache."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    # No end-of-text token: it never occurs, and no time is spent on masking it.
    model: Any = GPT2LMHeadModel(GPT2Config(
        vocab_size=flags.vocab_size, n_positions=flags.max_positions, n_embd=flags.embed_dim, n_layer=flags.num_layers,
        n_head=flags.num_heads, bos_token_id=None, eos_token_id=None))
    model.eval()
    ids = torch.tensor(prompts_of(flags.vocab_size, batch_size, flags.prompt_tokens))

    def work() -> list[list[int]]:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0,
            min_new_tokens=flags.new_tokens, max_new_tokens=flags.new_tokens)
        return found[:, flags.prompt_tokens:].tolist()

    return work


CONTESTANTS: dict[str, Callable[[Args], Callable[[], Any]]] = {
    "cached": cached,
    "naive": naive,
    "whole": whole,
    "k1": lambda flags: ours(flags, 1, 1),
    "k1_batch_8": lambda flags: ours(flags, 1, 8),
    "k": lambda flags: ours(flags, flags.tail_length, 1),
    "k_guided": lambda flags: ours(flags, flags.tail_length, 1, guidance_scale=2.0),
    "torch": lambda flags: in_torch(flags, 1),
    "torch_batch_8": lambda flags: in_torch(flags, 8),
}


def compare(names: Sequence[str], flags: Args, tokens: int) -> dict[str, dict[str, Any]]:
    """Lets `names` take turns and prints the time of each per token of a row."""
    found = alternate(__file__, names, words_of(flags), flags.rounds)
    for name in names:
        print(f"  {name:16}{1e3 * median(found, name) / tokens:10.1f} ms/token of each row"
              f"{found[name]['peak_bytes'] / 1e9:8.2f} GB peak", flush=True)
    return found


def main(args: Sequence[str]) -> None:
    """Prints the card, or runs as one of the contestants."""
    flags = parse(Args, args)
    if flags.contestant is not None:
        serve(CONTESTANTS[flags.contestant](flags))
        return
    print(f"decoding, {flags.num_layers} layers of {flags.embed_dim}, V {flags.vocab_size:,}, {flags.rounds} rounds")
    print(f"  S = {flags.history}, K = {flags.tail_length}, {flags.naive_tokens} tokens:")
    found = compare(("cached", "naive", "whole"), flags, flags.naive_tokens)
    ratios = {"cached_to_naive": ratio(found, "cached", "naive"), "cached_to_whole": ratio(found, "cached", "whole")}
    print_ratio("cached against naive", ratios["cached_to_naive"], 8.0)
    print(f"  cached against one pass of the model over the whole sequence: "
          f"{ratios['cached_to_whole']['median']:.2f} ×")
    print(f"  {flags.prompt_tokens} ids in front, {flags.new_tokens} tokens:")
    turn = functools.partial(compare, flags=flags, tokens=flags.new_tokens)
    for ends in ("", "_batch_8") if flags.torch else ():
        pair = turn((f"k1{ends}", f"torch{ends}"))
        found, ratios[f"k1_to_torch{ends}"] = found | pair, ratio(pair, f"k1{ends}", f"torch{ends}")
        print_ratio(f"K = 1 against transformers, batch {ends[-1:] or 1}", ratios[f"k1_to_torch{ends}"], 1.0)
    tails = turn(("k1", "k", "k_guided"))
    ratios |= {"k_times_k1": ratio(tails, "k1", "k"), "guided_times_k": ratio(tails, "k", "k_guided")}
    print(f"  K = {flags.tail_length} takes {ratios['k_times_k1']['median']:.2f} × the time of K = 1")
    guided = ratios["guided_times_k"]["median"]
    print(f"  guidance takes {guided:.2f} × the time without, aim below 2 ×: {'' if guided < 2 else 'not '}reached")
    found |= {f"{name}_again" if name in found else name: value for name, value in tails.items()}
    print(json.dumps({"benchmark": "decoding", "ratios": ratios, "found": found, "settings": asdict(flags),
                      "machine": machine()}))


if __name__ == "__main__":
    run_script(main)
