"""Fine-tuning: SmolLM2-135M starts maturing. The shape of the model and the tokenizer come from the import.

    python -m tokmat_jax hf import HuggingFaceTB/SmolLM2-135M runs/smollm2_135m_import
    python train.py --config configs/smollm2_135m.py --data.source 'files:text/*.parquet'
"""

from tokmat_jax.config import (
    Config,
    DataConfig,
    GenerationConfig,
    MaturationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        workdir="runs/smollm2_135m",
        init_from="runs/smollm2_135m_import",
        data=DataConfig(source="files:text/*.parquet", seq_len=512),
        maturation=MaturationConfig(max_tail_length=16, tail_noise=1.0, max_maturity=0.6),
        objective=ObjectiveConfig(negatives="full", logit_scale=20.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=200),
        train=TrainConfig(num_steps=10_000, batch_size=32, accumulation=4, log_every=50, eval_every=500,
                          eval_batches=32, sample_every=500, checkpoint_every=500),
        # Repulsion from the quickstart (docs/research-log.md), not tuned at this size.
        generation=GenerationConfig(tail_noise=1.0, max_maturity=0.6, repulsion=0.5),
    )
