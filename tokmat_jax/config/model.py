"""Settings of the model: the vocabulary table and the backbone f_θ."""

from dataclasses import dataclass, field
from typing import Literal

from tokmat_jax.config.checks import Section, require, setting


@dataclass(frozen=True)
class TableConfig(Section, name="table"):
    """The vocabulary table E: rows e_i = R · w_i / ‖w_i‖ (paper §3.1)."""

    radius: float = setting(1.0, above=0)
    """R, the norm of every row; if the rows are `raw`, the unit in which movement is measured."""
    geometry: Literal["sphere", "raw"] = "sphere"
    """`sphere`: rows of norm R; `raw`: unchanged rows, for an imported language model (`objective.kind` "ar")."""
    tied: bool = True
    """Whether predictions are compared with the rows of E; if False, with a separate output table ("ar" only)."""
    trainable: bool = True
    """Whether the rows move during training."""
    initial: str | None = setting(None, paired=True)
    """A `.npy` file of shape [V, d] to start from; None starts from random directions."""


@dataclass(frozen=True)
class RopeConfig(Section, name="model.rope"):
    """Frequencies of rotary positions. Names and meanings are those of the checkpoints that need them."""

    theta: float = setting(10_000.0, above=1)
    """Base: pair i of a head of size D turns by theta^(−2i/D) per position."""
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """How the context was extended. `dynamic` only acts beyond `model.max_positions`, so it has no effect here."""
    factor: float = setting(1.0, at_least=1)
    """Factor by which the context was extended; `linear`, `llama3` and `yarn` slow pairs down by it."""
    original_positions: int = setting(8192, above=0)
    """Context length before the extension (`llama3` and `yarn`)."""
    low_freq_factor: float = setting(1.0, above=0)
    """`llama3`: pairs with fewer turns than this in the original context are slowed down fully."""
    high_freq_factor: float = 4.0
    """`llama3`: pairs with more turns than this are unchanged."""
    beta_fast: float = 32.0
    """`yarn`: pairs with more turns than this in the original context are unchanged."""
    beta_slow: float = setting(1.0, above=0)
    """`yarn`: pairs with fewer turns than this are slowed down fully."""
    truncate: bool = True
    """`yarn`: whether the two bounds are rounded to whole pairs."""
    attention_factor: float = setting(1.0, above=0)
    """`yarn`: factor by which the rotated queries and keys are scaled."""
    partial: float = setting(1.0, above=0, at_most=1)
    """Share of a head's coordinates that are rotated, from the first on."""
    window_theta: float | None = setting(None, above=1)
    """Base in the layers of `model.windowed_layers`, whose context is not extended; None: as in all others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.low_freq_factor < self.high_freq_factor and self.beta_slow < self.beta_fast,
                f"model.rope: low_freq_factor must be below high_freq_factor and beta_slow below beta_fast, found "
                f"{self.low_freq_factor}, {self.high_freq_factor}, {self.beta_slow}, {self.beta_fast}")
        require(self.window_theta is None or self.attention_factor == 1,
                f"model.rope: attention_factor must be 1 with a window_theta, found {self.attention_factor}")


@dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """The backbone f_θ: causal, pre-norm, vectors in and vectors out.

    The defaults are GPT-2's parts; Llama's are `norm` rms, `mlp` swiglu, `positions` rotary, no biases.
    """

    embed_dim: int = setting(128, above=0)
    """d, the width of the vectors and of the residual stream."""
    num_layers: int = setting(3, above=0)
    """Transformer blocks."""
    num_heads: int = setting(4, above=0)
    """Attention heads."""
    num_kv_heads: int | None = setting(None, above=0)
    """Heads of keys and values, each shared by num_heads / num_kv_heads of the queries'; None means num_heads."""
    head_dim: int | None = None
    """Width of a head; None means d / num_heads."""
    attention_bias: Literal["all", "qkv", "none"] = "all"
    """Which of attention's four matrices have a bias; `qkv` leaves out the output's."""
    query_key_norm: bool = False
    """Whether each head's queries and keys are normalised, before they are rotated."""
    attention_scale: float | None = setting(None, above=0)
    """Factor of the attention scores; None means 1 / √(width of a head)."""
    attention_window: int | None = setting(None, above=0)
    """Number of positions that a position sees in `windowed_layers`, itself and those before it."""
    windowed_layers: tuple[int, ...] = ()
    """Layers with `attention_window`, from 0; all others see everything before."""
    mlp: Literal["gelu", "gelu_exact", "swiglu", "geglu"] = "gelu"
    """A block's MLP: GELU (tanh form, or exact), or hidden units times a gate's SiLU (`swiglu`) or GELU (`geglu`, tanh
    form)."""
    mlp_dim: int | None = setting(None, above=0)
    """Hidden width of the MLP; None means 4 d."""
    mlp_bias: bool = True
    """Whether the MLP's matrices have a bias."""
    norm: Literal["layer", "rms", "rms_plus_one"] = "layer"
    """LayerNorm, or RMSNorm (no mean, no bias), whose factors are its weights or 1 + its weights."""
    norm_placement: Literal["before", "around"] = "before"
    """Norms before attention and MLP, or before and after them."""
    parallel_residual: bool = False
    """Whether the MLP reads the block's input; if False, it reads the input plus what attention adds."""
    norm_epsilon: float = setting(1e-6, above=0)
    """Added to the variance in every norm."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector per position, or queries and keys rotated by their position."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Frequencies of `rotary` positions."""
    max_positions: int | None = None
    """Number of positions; None means data.seq_len."""
    film: Literal["once", "per_layer"] = "once"
    """Where tail-length FiLM acts: after the input, or at the entry of every block."""
    input_norm: float = setting(1.0, above=0)
    """Norm to which the input vectors are scaled (what the backbone expects of an embedding)."""
    head: Literal["linear", "identity"] = setting("linear", paired=False, own=True)
    """What turns the last norm's output into predictions: a matrix, or nothing (an imported language model)."""
    head_init: float = setting(0.5, above=0, paired=False, own=True)
    """Norm of the predictions at initialisation, in units of R: the head must start small."""
    dtype: Literal["float32", "bfloat16"] = setting("float32", own=True)
    """Compute type; parameters and reductions stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None:
            require(self.embed_dim % self.num_heads == 0,
                   f"model.num_heads must divide model.embed_dim, found {self.num_heads} and {self.embed_dim}")
        require(self.num_heads % self.kv_heads == 0,
                f"model.num_kv_heads must divide model.num_heads, found {self.kv_heads} and {self.num_heads}")
        require((self.attention_window is None) == (not self.windowed_layers),
                f"model.attention_window and model.windowed_layers belong together, found {self.attention_window} and "
                f"{self.windowed_layers}")
        require(all(0 <= layer < self.num_layers for layer in self.windowed_layers),
                f"model.windowed_layers must lie in 0..{self.num_layers - 1}, found {self.windowed_layers}")
        require(self.rope.window_theta is None or bool(self.windowed_layers),
                "model.rope.window_theta needs model.windowed_layers")
        require(self.embed_dim % 2 == 0, f"model.embed_dim must be even, found {self.embed_dim}")
        require(self.head_size > 0, f"model.head_dim must be positive, found {self.head_size}")
        require(self.positions == "learned" or (self.rotated > 0 and self.rotated % 2 == 0),
                f"model.head_dim times model.rope.partial must be even for rotary positions, found {self.rotated}")

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotated(self) -> int:
        """Number of a head's coordinates that rotary positions turn."""
        return int(self.head_size * self.rope.partial)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim
