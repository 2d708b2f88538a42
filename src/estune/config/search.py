"""The settings of the strategy: from the rewards of a population to an update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from estune.config.values import Section, bound, rate, scales
from estune.es.objective import PerPrompt
from estune.es.rate import Rate
from estune.es.schedule import Course
from estune.es.shaping import Shaping
from estune.weights.policies import NoiseMode, rank_of


class Search(Section):
    """The strategy."""

    steps: int = Field(500, ge=0, description="ES steps")
    population: int = Field(30, ge=2, description="members evaluated a step (N)")
    sigma: float = Field(0.001, gt=0, description="standard deviation of the perturbations")
    sigma_scheduler_type: Course = Field("constant", description="sigma over the run: constant, or falling")
    min_sigma_rate: float = Field(0.1, gt=0, le=1, description="share of sigma that a falling one ends at")
    sigma_warmup_steps: int = Field(0, ge=0, description="steps in which sigma rises to its full value")
    sigma_scale: Annotated[dict[str, float | Literal["rms"]], BeforeValidator(scales)] = Field(
        {},
        description="factors of sigma by shell pattern of parameters' names, of which the first that fits counts: "
        '{"*.mlp.*": 0.5}; rms is a parameter\'s root mean square over that of all. Their updates have them too',
    )
    adapt_sigma: bool = Field(
        False,
        description="one-fifth rule: sigma grows where more than a fifth of the members beat the base, which completes "
        "the step's prompts too, and shrinks where fewer do",
    )
    learning_rate: Annotated[float | str | None, BeforeValidator(rate)] = Field(
        None,
        description="alpha, 1/sigma digested into it; or, as 0.5sigma, a multiple of sigma, changing with it; if not "
        "given, half of sigma, and for more than 30 members sqrt(population / 30) times that, 3 times at most",
    )
    lr_scheduler_type: Course = Field("constant", description="learning rate over the run: constant, or falling")
    min_lr_rate: float = Field(0.0, ge=0, le=1, description="share of the learning rate that a falling one ends at")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises to its full value")
    shaping: Shaping = Field(
        "zscore",
        description="from rewards to weights of members: z-scores (the paper), z-scores of ranks, of winsorized "
        "rewards, or of 1 for the best and 0 for the rest (elite), or the distance from the mean (raw)",
    )
    shaping_share: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="members that are elite; or whose rewards are winsorized, half of them at each end",
    )
    per_prompt: PerPrompt = Field(
        "none",
        description="what is done to a prompt's scores before a member's mean is taken: nothing, the mean over members "
        "taken off (center), and divided by their standard deviation (standardize)",
    )
    prompt_groups: int = Field(
        1, ge=1, description="groups of members, each with prompts_per_step prompts of its own; 1 as in the paper"
    )
    samples_per_prompt: int = Field(1, ge=1, description="completions of each prompt by each member, when sampling")
    best_of: int = Field(
        1, ge=1, description="a prompt's score is the expected best of so many of its samples (pass@k); 1 is their mean"
    )
    reward_quantile: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a member's fitness is this quantile of its prompts' scores; their mean if not given",
    )
    constraint: Annotated[str | None, BeforeValidator(bound)] = Field(
        None,
        description="a second objective: METRIC<=BOUND or METRIC>=BOUND, of a metric that each member "
        "has, as completions/mean_length<=20, or kl, from the base model; kept by a penalty that is learned",
    )
    constraint_rate: float = Field(0.5, gt=0, description="how fast the penalty of the constraint is learned")
    momentum: float = Field(
        0.0, ge=0, lt=1, description="weight of earlier steps in an update, each step back once more; costs their noise"
    )
    momentum_window: int | None = Field(
        None, ge=1, description="earlier steps at most; as far as they count 5%, if not given. 1 reuses the last alone"
    )
    guided_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each perturbation's variance along the last updates (guided ES); costs each member the "
        "noise of all their members",
    )
    guided_window: int = Field(1, ge=1, description="updates along which guided members are perturbed")
    adam: bool = Field(
        False,
        description="scale the update of each weight by moments of all updates so far, as Adam does; with "
        "weights=master, 8 bytes more a weight, and resuming makes all steps again",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, with adam")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment, with adam")
    sam_rho: float = Field(
        0.0,
        ge=0,
        description="makes of every two steps a sharpness-aware one (SAM): the first moves the base down its gradient "
        "by so many sigmas a weight, and the second takes that back and adds the update that it finds there",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decay toward zero a step, times the learning rate; none in a step whose rewards are all equal",
    )
    anchor_decay: float = Field(0.0, ge=0, description="decay toward the base model a step, times the learning rate")
    anchor_l1: float = Field(
        0.0, ge=0, description="how far a weight goes back toward the base model a step, times the learning rate"
    )
    mirrored: bool = Field(False, description="evaluate each perturbation with both signs")
    evaluate_base: bool = Field(
        False, description="the base completes each step's prompts too, as one more member a group: reward_base"
    )
    guard: float | None = Field(
        None,
        ge=0,
        description="take a step back, and halve the learning rate from there on, where the base then earns less than "
        "before on the step's prompts, by more than so many standard deviations of the members' rewards. The base "
        "completes them before and after, as two more members of each group",
    )
    back_to_best: float | None = Field(
        None,
        ge=0,
        description="go back to the weights of the best evaluation, and halve the learning rate from there on, where "
        "one falls below it by more than this, in accuracy (or whatever tells the best): 0.05 is 5 points of percent",
    )
    noise: Literal[NoiseMode, "auto"] = Field(
        "auto",
        description="iid, the paper's; rank1: of a matrix an outer product of two vectors, so that many members can be "
        "decoded together; rank2, rank4 and rank8: the sum of so many; correlated: equal noise for all tensors, as in "
        "the authors' first code; auto is rank1 on a CPU, for models of 16 million weights and more that decode so, "
        "where members have fewer than 64 completions",
    )

    @property
    def noise_mode(self) -> NoiseMode:
        """The noise; `iid` as long as nobody has looked what `auto` is."""
        return "iid" if self.noise == "auto" else self.noise

    @property
    def noise_rank(self) -> int:
        """Outer products that a matrix' noise is the sum of; 0 where it is of no low rank."""
        return rank_of(self.noise)

    @property
    def members(self) -> int:
        """Members of a step, with the base where it takes part, in each group."""
        return self.population + self.base_takes_part * self.prompt_groups

    @property
    def steps_in_one(self) -> int:
        """Steps that belong together, with the same prompts."""
        return 2 if self.sam_rho else 1

    @property
    def constrains_kl(self) -> bool:
        """Whether the second objective is the members' divergence from the base model."""
        return (self.constraint or "").startswith(("kl<", "kl>"))

    @property
    def base_takes_part(self) -> bool:
        """Whether the base completes the prompts of each step, too."""
        return self.evaluate_base or self.adapt_sigma or self.guard is not None

    @model_validator(mode="after")
    def _with_rate(self) -> Search:
        if self.learning_rate is None:
            self.learning_rate = str(Rate.default(self.population))
        return self

    @model_validator(mode="after")
    def _check_decay(self) -> Search:
        alpha = Rate.read(self.learning_rate or 0.0).at(self.sigma)
        for name, decay in (("weight_decay", self.weight_decay), ("anchor_decay", self.anchor_decay)):
            if alpha * decay > 1:
                raise ValueError(
                    f"{name} {decay:g} times the learning rate, {alpha:g}, is more than the whole way a step: lower one"
                )
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Search:
        if self.mirrored and self.population % 2:
            raise ValueError(f"population {self.population} is odd, and mirrored members come in pairs")
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Search:
        size, left = divmod(self.population, self.prompt_groups)
        if left or size < 2 or (self.mirrored and size % 2):
            pairs = ", in pairs" if self.mirrored else ""
            raise ValueError(
                f"population {self.population} makes no {self.prompt_groups} prompt_groups of equal size, of two "
                f"members or more{pairs}"
            )
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Search:
        if self.best_of > self.samples_per_prompt:
            raise ValueError(
                f"best_of {self.best_of} of samples_per_prompt {self.samples_per_prompt}: raise the latter"
            )
        return self
