"""The config of a run: all sections of its settings, and the checks between them."""

from dataclasses import dataclass

from tokmat_jax.config.checks import require, section, setting
from tokmat_jax.config.generation import GenerationConfig
from tokmat_jax.config.machine import ClusterConfig, ComputeConfig, MeshConfig
from tokmat_jax.config.model import ModelConfig, TableConfig
from tokmat_jax.config.text import DataConfig, TokenizerConfig
from tokmat_jax.config.training import (
    MOST_MOVED,
    AdapterConfig,
    MaturationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    workdir: str = setting("runs/default", free=True)
    """Folder for everything that the run writes: config, tokenizer, checkpoints, metrics, samples."""
    init_from: str | None = setting(None, paired=True)
    """Workdir whose model the run starts from: imported weights or another run. The model's shape and the tokenizer
    are taken from it."""
    data: DataConfig = section(DataConfig, paired=True)
    tokenizer: TokenizerConfig = section(TokenizerConfig, paired=True)
    table: TableConfig = section(TableConfig)
    model: ModelConfig = section(ModelConfig, paired=True)
    maturation: MaturationConfig = section(MaturationConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    adapter: AdapterConfig = section(AdapterConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig, paired=True)
    train: TrainConfig = section(TrainConfig)
    mesh: MeshConfig = section(MeshConfig, free=True)
    compute: ComputeConfig = section(ComputeConfig, free=True)
    cluster: ClusterConfig = section(ClusterConfig, free=True)
    generation: GenerationConfig = section(GenerationConfig, free=True)

    def __post_init__(self) -> None:
        window = self.data.seq_len
        require(self.maturation.max_tail_length < window,
                f"maturation.max_tail_length (K_max) must be smaller than data.seq_len, so that a committed "
                f"position is left, found {self.maturation.max_tail_length} and {window}")
        require(self.maturation.num_tails == 0 or self.maturation.max_tail_length + MOST_MOVED < window,
                f"maturation.num_tails: a tail of {self.maturation.max_tail_length} slots does not fit into a window "
                f"of data.seq_len {window}")
        require(self.max_positions >= window,
                f"model.max_positions must be at least data.seq_len, found {self.max_positions} and {window}")
        require(self.compute.attention == "xla" or (self.model.dtype == "bfloat16" and self.model.head_size % 8 == 0),
                f"compute.attention 'cudnn' needs model.dtype 'bfloat16' and heads whose width is a multiple of 8, "
                f"found {self.model.dtype!r} and {self.model.head_size}")
        require(self.compute.attention == "xla" or not self.model.windowed_layers,
                f"compute.attention 'cudnn' sees all positions, the layers {self.model.windowed_layers} have a window "
                f"(model.attention_window): take 'xla'")
        if self.objective.kind == "maturation":
            require(self.table.geometry == "sphere" and self.table.tied and self.model.head == "linear",
                    f"maturation needs table.geometry 'sphere', one tied table and model.head 'linear', found "
                    f"{self.table.geometry!r}, table.tied {self.table.tied} and {self.model.head!r}")
        if self.objective.kind == "tail":
            require(self.init_from is not None, "objective.kind 'tail' needs a language model: give init_from")
            require(self.maturation.num_tails > 0 and self.maturation.max_maturity < 1,
                    f"objective.kind 'tail' needs maturation.num_tails, and a maturation.max_maturity below 1, by "
                    f"which slots differ from committed positions; found {self.maturation.num_tails} and "
                    f"{self.maturation.max_maturity}")
        require(self.adapter.rank is None or self.init_from is not None,
                f"adapter.rank {self.adapter.rank} needs a model to adapt: give init_from")
        require(not self.adapter.rank or self.adapter.matrices != ("mlp_gate",) or self.model.gated,
                "adapter.matrices: this model's blocks have no mlp_gate, so that there is nothing to adapt")
        require((self.adapter.rank or 0) <= self.model.embed_dim,
                f"adapter.rank must not exceed model.embed_dim ({self.model.embed_dim}), the full rank, found "
                f"{self.adapter.rank}")
        require(self.init_from is None or self.table.initial is None,
                "init_from brings a table of its own: leave out table.initial")
        require(self.generation.steering == 0.0 or bool(self.generation.steering_words),
                "generation.steering needs a direction: give generation.steering_words")
        require(self.generation.tail_length <= self.max_positions - 2,
                f"generation.tail_length (K) must be smaller than the model's positions by at least 2 (a prompt and a "
                f"new token), found {self.generation.tail_length} and {self.max_positions}")

    @property
    def trains_all(self) -> bool:
        """Whether the whole model is trained, not only what is added to another one."""
        return self.adapter.rank is None and self.objective.kind != "tail"

    @property
    def max_positions(self) -> int:
        """Number of positions of the backbone."""
        return self.data.seq_len if self.model.max_positions is None else self.model.max_positions
