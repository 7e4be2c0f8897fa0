"""Settings of a generation: how the liquid tail is run."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokmat_jax.config.checks import Section, require, setting
from tokmat_jax.config.training import Profile

SteeringSchedule = Literal["constant", "fade", "rise"]
Commit = Literal["front", "stable", "verified"]
Draft = Literal["tail", "lookup", "both"]
_LARGEST = 1_000_000
"""Largest absolute value of a number here: vectors then stay finite and counts fit into 32 bits."""


def _plain(value: Any) -> Any:
    """Converts a NumPy or JAX scalar to a Python number, which JSON can hold; returns anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class GenerationConfig(Section, name="generation"):
    """How the liquid tail is run (paper Algorithm 1). Each field is a flag of `generate.py`, its docstring the help.

    Facts at the fields: `every_model` marks a field that also affects a model without a tail. A field marked
    `of_stable` or `of_verified` only has an effect with that `commit`, and one marked `of_steering` only if `steering`
    is not 0.
    """

    tail_length: int = setting(8, at_least=1, symbol="K")
    """K, slots of the liquid tail; 1 is immediate projection."""
    profile: Profile = "linear"
    """Maturity along the tail, front first."""
    max_maturity: float = setting(0.9, at_least=0, at_most=1)
    """α_max, maturity of the front slot."""
    rate: float | tuple[float, ...] | None = None
    """η of the front slot in [0, 1], which decreases along the tail as the maturity does; or K numbers, one per slot,
    front first. None: each slot's rate is its maturity."""
    tail_noise: float = setting(0.3, at_least=0)
    """σ, norm of the embryos, in units of R; 0 to 1 is usual."""
    fresh_noise: float = setting(0.0, at_least=0)
    """σ_f, norm of the noise added to the slots at every step, scaled by 1 − maturity, in units of R; 0 is off, 0.5 is
    strong."""
    history_noise: float = setting(0.0, at_least=0)
    """σ_h, norm of the noise added to a vector when it enters the history, in units of R; 0 is off, 1 is as long as the
    vector."""
    history_smoothing: float = setting(0.0, at_least=0, below=1)
    """h in [0, 1), share of the previous vector in a vector that enters the history; 0 is off."""
    guidance_scale: float = 1.0
    """s; 1 is off, 1.5 to 3 is usual."""
    repulsion: float = setting(0.0, at_least=0, every_model=True)
    """ρ, how far a prediction is pushed away from the tokens committed after similar predictions, as a share of its
    norm; 0 is off. With guidance, the conditional prediction is pushed, so s multiplies the push."""
    repulsion_sharpness: float = setting(10.0, above=0, every_model=True)
    """b: an earlier position whose prediction has the cosine c with this one has the weight exp(b (c − 1))."""
    steering: float = 0.0
    """γ, how far predictions are drawn towards the steering direction, in units of R; 0 is off, 0.1 to 0.5 is usual,
    negative pushes away."""
    steering_words: tuple[str, ...] = setting((), of_steering=True)
    """Words whose mean embedding is the steering direction (for a vector of your own, use `--steering-vector` or the
    argument `direction`)."""
    steering_slots: tuple[int, ...] = setting((), of_steering=True)
    """Slots to steer, 0 is the front; if none are given, all are steered."""
    steering_schedule: SteeringSchedule = setting("constant", of_steering=True)
    """Strength from a sample's first token to the last of its budget: constant, falling to 0, or rising from 0."""
    commit: Commit = "front"
    """`front`: one token per step; `stable`: all settled slots from the front on, at least one; `verified`: the front's
    prediction itself (η_0 = 1), and drafts for the tokens after it as long as the same pass confirms them."""
    max_commit: int = setting(4, above=0, of_stable=True, of_verified=True)
    """Maximum number of tokens that a step of `stable` or `verified` commits (never more than K)."""
    draft: Draft = setting("both", of_verified=True)
    """Drafts that `verified` checks. `tail`: the nearest tokens of the slots; `lookup`: the tokens that followed when
    the last tokens occurred before; `both`: `lookup` if it finds any, else `tail`. Changes the speed, never the
    text."""
    model_tail_length: int | None = setting(None, at_least=0)
    """The K that the model is given at committed positions and at drafts; their keys, and so the text, depend on it.
    None: `tail_length`, or 0 if the run had many tails per window."""
    patience: int = setting(1, at_least=0, of_stable=True)
    """Updates in a row that must leave a slot's nearest token unchanged before `stable` commits it early."""
    tolerance: float = setting(0.1, above=0, of_stable=True)
    """`stable` commits a slot early only if its last movement ‖Δz̃‖/R is below this."""
    max_new_tokens: int = setting(64, above=0, every_model=True)
    """Token budget of a sample; end-of-text may come earlier."""
    min_new_tokens: int = setting(0, at_least=0, every_model=True)
    """No sample ends before it has this many new tokens; 0 is off. It always ends with its budget."""
    entropy_temperature: float = setting(1.0, above=0, every_model=True)
    """τ of the reported entropy of softmax(cos/τ)."""
    entropy_candidates: int | None = setting(None, at_least=1, every_model=True)
    """Number of nearest tokens over which the reported entropy is taken (the article seems to use 50); None takes all
    of V."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value))
        self._check_kinds()
        super().__post_init__()
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate or 0.0,)
        require(all(0.0 <= one <= 1.0 for one in rates), f"generation.rate must lie in [0, 1], found {self.rate}")
        require(not isinstance(self.rate, tuple) or len(self.rate) == self.tail_length,
                f"generation.rate is one number, or one per slot of the tail ({self.tail_length}), found {self.rate}")
        require(all(0 <= slot < self.tail_length for slot in self.steering_slots),
                f"generation.steering_slots must lie in 0..{self.tail_length - 1} (K = {self.tail_length}), found "
                f"{self.steering_slots}")
        require(all(word.strip() for word in self.steering_words),
                f"generation.steering_words must not be blank, found {self.steering_words}")
        for name, value in vars(self).items():
            require(not isinstance(value, float | int) or abs(value) <= _LARGEST,
                   f"generation.{name} must lie within ±{_LARGEST:,}, found {value}")

    def _check_kinds(self) -> None:
        """Raises ConfigError for values of a wrong type, which a type checker would find in a script."""
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            require(one.type is not int or _is_number(value, int),
                    f"generation.{one.name} must be a whole number, found {value!r}")
            require(one.type is not float or _is_number(value, int | float),
                    f"generation.{one.name} must be a number, found {value!r}")
        for name, known in (("profile", Profile), ("steering_schedule", SteeringSchedule), ("commit", Commit),
                            ("draft", Draft)):
            require(getattr(self, name) in get_args(known), f"generation.{name} must be one of "
                    f"{', '.join(get_args(known))}, found {getattr(self, name)!r}")
        for name in ("steering_words", "steering_slots"):
            require(isinstance(getattr(self, name), tuple),
                    f"generation.{name} must be a tuple, found {getattr(self, name)!r}")
        rates = self.rate if isinstance(self.rate, tuple) else (0.0 if self.rate is None else self.rate,)
        require(all(_is_number(one, int | float) for one in rates),
                f"generation.rate must be None, a number or a tuple of numbers, found {self.rate!r}")
        require(all(_is_number(slot, int) for slot in self.steering_slots),
                f"generation.steering_slots must be whole numbers, found {self.steering_slots}")
        require(all(isinstance(word, str) for word in self.steering_words),
                f"generation.steering_words must be texts, found {self.steering_words}")

    def immediate(self) -> "GenerationConfig":
        """Immediate projection: K = 1, α = η = 1 and no noise, as a language model decodes; repulsion is kept."""
        return GenerationConfig(
            tail_length=1, profile="constant", max_maturity=1.0, tail_noise=0.0, model_tail_length=0,
            repulsion=self.repulsion, repulsion_sharpness=self.repulsion_sharpness, max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            entropy_temperature=self.entropy_temperature, entropy_candidates=self.entropy_candidates)

    def with_tail_length(self, tail_length: int) -> "GenerationConfig":
        """These settings with a K that is no longer than theirs, without the settings of the slots that are removed."""
        rate = self.rate[:tail_length] if isinstance(self.rate, tuple) else self.rate
        slots = tuple(slot for slot in self.steering_slots if slot < tail_length)
        gone = bool(self.steering_slots) and not slots
        return dataclasses.replace(self, tail_length=tail_length, rate=rate, steering_slots=slots,
                                   steering=0.0 if gone else self.steering)
