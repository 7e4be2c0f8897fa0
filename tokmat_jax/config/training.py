"""Settings of training: the simulated tail, the loss, the optimiser, the loop."""

from dataclasses import dataclass
from typing import Literal, get_args

from tokmat_jax.config.checks import Section, require, setting

Profile = Literal["linear", "cosine", "constant"]
"""Maturity along the tail, front first."""
MOST_MOVED = 2
"""With many tails per window: by how many positions at most the slots have moved up since the pass that gave them the
model's own vectors, as a pass of the decoder moves them by the number of tokens that it commits."""


@dataclass(frozen=True)
class MaturationConfig(Section, name="maturation"):
    """The simulated tail of training (paper §3.3)."""

    max_tail_length: int = setting(16, at_least=1, symbol="K_max")
    """K_max; each row draws its K from 1..K_max."""
    no_tail_prob: float = setting(0.1, at_least=0, at_most=1)
    """Probability that a row has no tail at all (K = 0); the windows of `num_tails` never read one."""
    profile: Profile = "linear"
    """Maturity along the tail, front first."""
    max_maturity: float = setting(0.9, above=0, at_most=1)
    """α_max, maturity of the front slot; it weights the tail's loss."""
    tail_noise: float = setting(0.3, at_least=0)
    """σ, norm of the noise in units of R."""
    history_dropout: float = setting(0.1, at_least=0, at_most=1)
    """Share of tails that are predicted without the history (trains the unconditional branch); never if the objective
    is `tail`, because the front is then not the tail's."""
    self_condition_prob: float = setting(0.0, at_least=0, at_most=1)
    """Share of tails that are built from the model's own predictions, instead of the truth or, with `num_tails`, of
    embryos."""
    num_tails: int = setting(0, at_least=0, symbol="M")
    """M, tails of K_max slots at random positions beside each window; 0 is the paper's one tail at its end."""
    tails_weight: float = setting(1.0, at_least=0, symbol="μ")
    """μ, weight of the mean loss of the slots of many tails beside that of the window."""
    tails_target: Literal["text", "model"] = "text"
    """What the slots of many tails learn to predict: the text, or what the model itself predicts at their positions
    once it has read the text up to there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_tails == 0 or self.max_tail_length > 1,
                f"maturation.num_tails needs a maturation.max_tail_length (K_max) of at least 2, because the front is "
                f"predicted without a slot; found {self.max_tail_length}")


@dataclass(frozen=True)
class ObjectiveConfig(Section, name="objective"):
    """What is minimised: L = L_reg + λ L_nce, or the baseline's cross-entropy."""

    kind: Literal["maturation", "ar", "tail"] = "maturation"
    """`maturation`: MSE + InfoNCE on a simulated tail; `ar`: next-token cross-entropy on the tied table; `tail`: a tail
    in front of the language model that the run starts from, which stays as it is, trained with MSE + InfoNCE."""
    nce_weight: float = setting(1.0, at_least=0)
    """λ."""
    logit_scale: float = 20.0
    """κ, scale of the cosines in InfoNCE and of the baseline's logits (its initial value if it is learned).
    Logits are κ ⟨ẑ, e_i⟩ / R² on the sphere and κ ⟨ẑ, e_i⟩ with a raw table."""
    slot_logit_scale: float = setting(20.0, above=0)
    """κ of InfoNCE for the slots of a `tail`; the other κ is then that of the language model."""
    learn_logit_scale: bool = False
    """Whether κ is a parameter (kept within 1..100)."""
    negatives: Literal["uniform", "batch", "unigram", "full", "weighted"] = "uniform"
    """Source of the negatives of InfoNCE: the vocabulary, the batch's targets, unigram^β, or all of V. `weighted` takes
    all of V too and counts each as often as it would occur in V draws from unigram^β."""
    num_negatives: int = setting(256, above=0)
    """|N|, number of negatives, shared by the targets of a step (`full` and `weighted` take all of V)."""
    unigram_power: float = setting(0.75, at_least=0)
    """β of `unigram` and `weighted`: 0 is the likelihood, 1 is PMI."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.logit_scale > 0 and (not self.learn_logit_scale or 1.0 <= self.logit_scale <= 100.0),
                f"objective.logit_scale must be positive, and within [1, 100] if it is learned, "
                f"found {self.logit_scale}")


Matrix = Literal["query", "key", "value", "attention_out", "mlp_in", "mlp_gate", "mlp_out"]
"""A matrix of a block."""


@dataclass(frozen=True)
class AdapterConfig(Section, name="adapter"):
    """What is trained of a model that a run starts from: all of it, or an adapter (LoRA) beside it."""

    rank: int | None = setting(None, at_least=0)
    """r, rank of the adapters. None trains the whole model. With a rank, the model that the run starts from is frozen;
    the adapters and what maturation adds (maturity MLP, FiLM, head, κ) are trained, or only the latter if it is 0."""
    matrices: tuple[Matrix, ...] = get_args(Matrix)
    """The matrices of each block that have an adapter."""
    scale: float = setting(2.0, above=0)
    """s, factor of an adapter's output."""
    dropout: float = setting(0.0, at_least=0, below=1)
    """Probability with which an input of an adapter is dropped in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [name for name in self.matrices if name not in get_args(Matrix)]
        require(not wrong, f"adapter.matrices: a block has {', '.join(get_args(Matrix))}, found {wrong}")
        require(not self.rank or bool(self.matrices), "adapter.rank needs adapter.matrices to adapt, found none")


@dataclass(frozen=True)
class OptimizerConfig(Section, name="optimizer"):
    """How the parameters are updated."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the matrices of the blocks; everything else stays with AdamW."""
    learning_rate: float = setting(2e-3, above=0)
    """Peak rate of AdamW's parameters."""
    muon_learning_rate: float = setting(2e-2, above=0)
    """Peak rate of Muon's matrices."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up, down to `final_share` of the peak."""
    warmup_steps: int = setting(50, at_least=0)
    """Steps of linear warm-up from 0."""
    final_share: float = setting(0.05, at_least=0, at_most=1)
    """Rate at the last step as a share of the peak (`cosine` and `linear`)."""
    weight_decay: float = setting(0.1, at_least=0)
    """Decoupled decay of the matrices; with Muon, only of Muon's (never of biases, norms, table or embeddings)."""
    beta1: float = setting(0.9, at_least=0, at_most=1)
    """AdamW's decay of the first moment."""
    beta2: float = setting(0.98, at_least=0, at_most=1)
    """AdamW's decay of the second moment."""
    clip_norm: float = setting(1.0, above=0)
    """Gradients with a larger global norm are scaled down to this one."""


@dataclass(frozen=True)
class TrainConfig(Section, name="train"):
    """The training loop."""

    num_steps: int = setting(1000, above=0, free=True, paired=True)
    """Updates of the whole run; a resumed run may change it, and the schedule then follows the new value."""
    batch_size: int = setting(16, above=0, paired=True)
    """B, windows per update over all devices and micro-batches."""
    accumulation: int = setting(1, above=0)
    """Micro-batches per update."""
    seed: int = 0
    """Seed of the parameters, data order, tails and negatives, 0..2³²−1."""
    log_every: int = setting(20, above=0, free=True)
    """Steps between two rows of metrics."""
    eval_every: int = setting(250, above=0, free=True)
    """Steps between two validations (the last step always has one)."""
    eval_batches: int = setting(8, above=0, free=True, paired=True)
    """Batches of the held-out split that a validation reads."""
    sample_every: int = setting(500, above=0, free=True)
    """Steps between two printed samples."""
    num_samples: int = setting(2, at_least=0, free=True)
    """Number of held-out beginnings to continue and print; 0 prints none."""
    checkpoint_every: int = setting(500, above=0, free=True)
    """Steps between two checkpoints (the last step always has one)."""
    keep_checkpoints: int = setting(2, above=0, free=True)
    """Number of newest checkpoints to keep."""
    max_skipped: int = setting(10, at_least=0, free=True)
    """Maximum number of steps in a row that may be skipped because of non-finite numbers; one more stops the run."""
    skip_batches: tuple[int, ...] = setting((), free=True)
    """Positions in the data, from 0, of batches to skip (`spikes.jsonl` lists those whose loss stood out)."""
    profile: tuple[int, int] | None = setting(None, free=True)
    """First and last step to trace; the trace goes into the workdir's `profile/`, for TensorBoard and Perfetto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(position >= 0 for position in self.skip_batches),
                f"train.skip_batches must not be negative, found {self.skip_batches}")
        require(0 <= self.seed < 2**32, f"train.seed must lie in 0..2³²−1, found {self.seed}")
        first, last = self.profile or (1, 1)
        require(1 <= first <= last, f"train.profile must be a first and a last step from 1 on, found {self.profile}")
        require(self.batch_size % self.accumulation == 0,
                f"train.accumulation must divide train.batch_size, found {self.accumulation} and {self.batch_size}")
