"""`softmax` and `sigmoid-bias`: the routers on paper.

Both may limit a token to the best `top_k_groups` of `num_groups` groups of neighbouring experts, so that it
visits few machines.
"""

from collections.abc import Iterable

from composeformer.config import Config, config, field
from composeformer.contracts import Constant, Cost, Declared, Linear, Normal, Phase, Saved, Weight
from composeformer.errors import Problem
from composeformer.site import Site

GROUP_SCORES = ("max", "top2")


def group_problems(config: "Softmax | SigmoidBias", site: Site) -> Iterable[Problem]:
    """What can not be of experts, groups and top_k."""
    experts = site.sizes["num_experts"]
    if config.top_k > experts:
        yield Problem("top_k", config.top_k, f"must be <= num_experts ({experts})")
        return
    if config.num_groups > experts or experts % config.num_groups:
        yield Problem("num_groups", config.num_groups, f"must divide num_experts ({experts})")
        return
    if config.top_k_groups > config.num_groups:
        told = f"must be <= num_groups ({config.num_groups})"
        yield Problem("top_k_groups", config.top_k_groups, told)
        return
    within = config.top_k_groups * (experts // config.num_groups)
    if config.top_k > within:
        told = f"must be <= {within}, the experts in {config.top_k_groups} of {config.num_groups} groups"
        yield Problem("top_k", config.top_k, told)
    if config.num_groups > 1 and config.group_score == "top2" and experts == config.num_groups:
        yield Problem("group_score", "top2", "needs groups of two experts or more; use max")


def gate(site: Site) -> Declared:
    """The map from a token to its experts' logits."""
    return Linear(
        name="gate",
        inputs=site.width,
        outputs=site.sizes["num_experts"],
        sensitive=True,
        init=Normal(site.spec.model.init_std),
    )


def kept(site: Site, top_k: int, of_all: int, of_chosen: int) -> Iterable[Saved]:
    """What a choice in fp32 keeps of each token: so many numbers of every expert, and of those chosen."""
    yield Saved(name="input", elements=site.width, dtype="float32")
    yield Saved(name="indices", elements=top_k, dtype="int64")
    yield Saved(name="of all", elements=of_all * site.sizes["num_experts"], dtype="float32")
    yield Saved(name="of chosen", elements=of_chosen * top_k, dtype="float32")


@config
class Softmax(Config):
    """Weights are softmax probabilities of the chosen experts' logits.

    Sources: arXiv 1701.06538, arXiv 2101.03961 (balance loss), arXiv 2202.08906 (z-loss); groups by their
    best expert: arXiv 2405.04434, section 2.2.2.
    """

    top_k: int = field(minimum=1, unit="experts", help="Experts that each token passes through.")
    normalize: bool = field(True, help="The chosen experts' weights sum to routed_scaling_factor.")
    softmax: str = field(
        "before",
        choices=("before", "after"),
        affects="execution",  # normalised, the two are one function
        help="Softmax over all experts before the choice, or over the chosen ones after it (always normalised).",
    )
    routed_scaling_factor: float = field(1.0, above=0.0, help="Multiplies the weights.")
    num_groups: int = field(1, minimum=1, unit="groups", help="Groups of neighbouring experts.")
    top_k_groups: int = field(1, minimum=1, unit="groups", help="Groups that a token may visit.")
    group_score: str = field(
        "max", choices=GROUP_SCORES, help="A group's score: its best expert's, or the sum of its two best."
    )
    balance_alpha: float = field(
        0.0, minimum=0.0, affects="training", help="Weight of the balance loss, taken in each sequence."
    )
    z_alpha: float = field(
        0.0, minimum=0.0, affects="training", help="Weight of the squared log-sum-exp of the logits."
    )

    def validate(self, site: Site) -> Iterable[Problem]:
        yield from group_problems(self, site)
        if self.softmax == "after" and not self.normalize:
            yield Problem("normalize", False, "a softmax after the choice is normalised")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield gate(site)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        """What is chosen from: logits, or probabilities beside which the z-loss has the logits."""
        if phase == "train":
            logits = self.z_alpha > 0 and not self.normalize
            yield from kept(site, self.top_k, 1 + (self.balance_alpha > 0) + logits, int(self.normalize))


@config
class SigmoidBias(Config):
    """Weights are sigmoids of the chosen experts' logits; a bias, moved after each step, balances the choice.

    Sources: arXiv 2408.15664 (the bias); arXiv 2412.19437, equations 12 to 20 (sigmoids, groups, the
    sequence-wise balance loss).
    """

    top_k: int = field(minimum=1, unit="experts", help="Experts that each token passes through.")
    normalize: bool = field(True, help="The chosen experts' weights sum to routed_scaling_factor.")
    routed_scaling_factor: float = field(1.0, above=0.0, help="Multiplies the weights.")
    num_groups: int = field(1, minimum=1, unit="groups", help="Groups of neighbouring experts.")
    top_k_groups: int = field(1, minimum=1, unit="groups", help="Groups that a token may visit.")
    group_score: str = field(
        "top2", choices=GROUP_SCORES, help="A group's score: the sum of its two best experts', or its best's."
    )
    bias_update_speed: float = field(
        0.001, minimum=0.0, affects="training", help="How far the bias moves in a step, up or down."
    )
    sequence_balance_alpha: float = field(
        0.0, minimum=0.0, affects="training", help="Weight of the sequence-wise balance loss."
    )

    def validate(self, site: Site) -> Iterable[Problem]:
        return group_problems(self, site)

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield gate(site)
        yield Weight(
            name="bias",
            shape=(site.sizes["num_experts"],),
            dtype="float32",
            trains=False,
            init=Constant(0.0),
        )

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        """What is chosen from; a softmax of log-sigmoids has two of each, and one is in the balance loss."""
        if phase == "train":
            of_all = 3 if self.sequence_balance_alpha else 1
            yield from kept(site, self.top_k, of_all, 2 if self.normalize else 0)
