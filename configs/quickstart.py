"""Five to eight minutes on two cores: a small model on the World English Bible (1.1 million tokens).

    pip install -e '.[quickstart]' && python train.py --config configs/quickstart.py
"""

from tokmat_jax.config import (
    Config,
    GenerationConfig,
    MaturationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        workdir="runs/quickstart",
        # Strong noise and a low maturity (`train_as_decoded` in docs/research-log.md).
        maturation=MaturationConfig(tail_noise=1.0, max_maturity=0.6),
        # With a small V all of it fits as negatives, the strongest signal a step can give.
        objective=ObjectiveConfig(negatives="full", logit_scale=10.0, learn_logit_scale=True),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-3),
        train=TrainConfig(num_steps=1400, batch_size=8, eval_every=350, eval_batches=16, sample_every=350,
                          checkpoint_every=350),
        # The tail as in training; repulsion brings Rep-3 to the human text's (docs/research-log.md).
        generation=GenerationConfig(tail_length=8, tail_noise=1.0, max_maturity=0.6, rate=0.9, repulsion=0.5),
    )
