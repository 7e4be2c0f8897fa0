"""The paper's run: the shape of GPT-2 Medium on FineWeb-10BT, 600,000 steps (arXiv:2601.04854).

    python train.py --config configs/gpt2_medium.py --data.source 'files:fineweb-10BT/*.parquet'
"""

from tokmat_jax.config import (
    Config,
    DataConfig,
    GenerationConfig,
    MaturationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        workdir="runs/gpt2_medium",
        data=DataConfig(source="files:fineweb-10BT/*.parquet", seq_len=1024, holdout=0.001),
        tokenizer=TokenizerConfig(kind="huggingface", name="gpt2"),
        model=ModelConfig(embed_dim=1024, num_layers=24, num_heads=16, norm_epsilon=1e-5, dtype="bfloat16"),
        maturation=MaturationConfig(max_tail_length=16),
        objective=ObjectiveConfig(negatives="uniform", num_negatives=256, logit_scale=20.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2000),
        # Batches of 8, four of them per update.
        train=TrainConfig(num_steps=600_000, batch_size=32, accumulation=4, log_every=100, eval_every=5000,
                          eval_batches=64, sample_every=5000, checkpoint_every=5000),
        # Repulsion from the quickstart (docs/research-log.md), not tuned at this size.
        generation=GenerationConfig(tail_length=16, repulsion=0.5),
    )
