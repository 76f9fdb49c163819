"""What training a spec's model takes: hours, days, money, energy and people, from `[cost]` and a hardware profile.

Three scopes, never added together: a run, the model's development, a year of the organisation. Renting and owning are
alternatives. Utilisation counts causal attention and no predictor, of the named peak; the same hours are told in the
other conventions beside it.
"""

from collections.abc import Mapping
from functools import cached_property

import attrs

from composeformer.costs import compute
from composeformer.costs.counts import Counts, cost
from composeformer.costs.economics import (
    Assumption,
    Development,
    Fleet,
    Quantiles,
    Run,
    Swing,
    Year,
    assumptions,
    development,
    fleet,
    hours_of,
    price,
    sampled,
    tokens_of,
    tornado,
    trend,
)
from composeformer.costs.hardware import Hardware, load
from composeformer.errors import InputError
from composeformer.spec import Spec

YEARS = 4  # before and after the run's own, in a trend


@attrs.frozen(kw_only=True)
class Utilisation:
    """Model FLOPs utilisation of the same hours by convention: of which peak, under which mask, with a predictor or
    without.
    """

    achieved: float  # operations a second and device, causal, without a predictor
    causal: float
    full_mask: float
    with_predictor: float | None
    of_other_peaks: Mapping[str, float]


@attrs.frozen(kw_only=True)
class Sensitivity:
    """What one assumption's range alone makes of a result, in USD: of the development where that depends on it, else of
    the first of the others that does.
    """

    of: str
    at_low: float
    at_high: float


class Pricing:
    """The price of training one model; parts are worked out when they are first asked for.

    Raises InputError where `[cost]` says neither tokens nor hours, or a peak that the hardware does not have.
    """

    def __init__(self, spec: Spec, counts: Counts | None = None) -> None:
        self.spec = spec
        self.config = spec.cost
        if self.config.tokens is None and self.config.gpu_hours is None and self.config.budget is None:
            told = "must be stated, or cost.gpu_hours, or cost.budget, to price a run; none is"
            raise InputError(f"cost.tokens: {told}")
        if self.config.gpu_hours is not None and self.config.budget is not None:
            raise InputError(
                "cost.budget: buys the hours of the run, and cost.gpu_hours states them; choose one"
            )
        longest, context = spec.model.max_position_embeddings, self.config.context
        if context is not None and context > longest:
            raise InputError(f"cost.context = {context}: must be <= max_position_embeddings ({longest})")
        self.hardware: Hardware = load(self.config.hardware)
        self.assumptions: dict[str, Assumption] = assumptions(spec)
        self.peak = self.hardware.peak(self.config.peak)
        self.counts = cost(spec, context=self.config.context) if counts is None else counts
        self.values = {name: each.value for name, each in self.assumptions.items()}
        if (hours := self.given_hours(self.values)) is not None and hours <= 0:
            told = f"buys no more than the {self.config.other_gpu_hours:,.0f} hours of cost.other_gpu_hours"
            raise InputError(f"cost.budget = {self.config.budget:g}: {told}")

    def given_hours(self, of: Mapping[str, float]) -> float | None:
        """Hours of pre-training that are stated, or that the budget buys; None where they follow from tokens."""
        if self.config.budget is not None:
            return self.config.budget / of["rate"] - self.config.other_gpu_hours
        return self.config.gpu_hours

    @property
    def per_token(self) -> float:
        """Training operations of a token: causal, without a predictor."""
        return self.counts.flops_per_token.training

    @cached_property
    def tokens(self) -> float:
        """Stated, or what the hours train."""
        of, hours = self.values, self.given_hours(self.values)
        if self.config.tokens is not None or hours is None:
            return self.config.tokens or 0.0
        return tokens_of(hours, self.per_token, self.peak.value, of["utilisation"], of["goodput"])

    def run_under(self, of: Mapping[str, float]) -> Run:
        """The run under other assumptions; hours that are stated stay, and so does a budget."""
        hours = self.given_hours(of)
        if hours is None:
            hours = hours_of(self.tokens * self.per_token, self.peak.value, of["utilisation"], of["goodput"])
        return price(
            of,
            pretraining_hours=hours,
            other_hours=self.config.other_gpu_hours,
            operations=self.tokens * self.per_token,
            gpus=self.config.gpus,
            tdp=self.hardware.power.value,
        )

    @cached_property
    def run(self) -> Run:
        return self.run_under(self.values)

    @cached_property
    def development(self) -> Development:
        return development(self.values, self.run)

    @cached_property
    def fleet(self) -> Fleet:
        """A year of the organisation's devices; of those that train where no fleet is stated."""
        return fleet(self.values, self.config.fleet or self.config.gpus, self.hardware.power.value)

    @cached_property
    def utilisation(self) -> Utilisation:
        """Of the pre-training's hours, in every convention."""
        # The hours that were lost did not compute.
        seconds = self.run.pretraining_hours * self.values["goodput"] * 3600.0
        achieved = self.tokens * self.per_token / seconds
        peak = self.peak.value
        scale = achieved / self.per_token / peak
        full = compute.forward(self.spec, context=self.counts.flops_per_token.context, causal=False)
        with_predictor = None
        if self.counts.predictor:
            with_predictor = self.counts.flops_per_token.training_with_predictor * scale
        if achieved > peak * (1 + 1e-12):
            told = f"{self.tokens:g} tokens in {self.run.pretraining_hours:,.0f} device hours"
            of = f"of the {self.config.peak} peak of {self.hardware.name}"
            given = "gpu_hours" if self.config.budget is None else "budget"
            raise InputError(f"cost.{given}: {told} are {achieved / peak:.0%} {of}")
        # Of a slower dtype's peak it would say nothing, and of an equal one nothing new.
        others = {d: achieved / f.value for d, f in self.hardware.peaks.items() if f.value > 1.001 * peak}
        return Utilisation(
            achieved=achieved,
            causal=achieved / peak,
            full_mask=3 * compute.total(full) * scale,
            with_predictor=with_predictor,
            of_other_peaks=others,
        )

    def results(self, of: Mapping[str, float]) -> dict[str, float]:
        """What ranges are given of, in USD: by scope. A run is told with what of it had to be done again."""
        run, again = self.run_under(of), 1.0 + of["restarts"]
        made = development(of, run)
        year = fleet(of, self.config.fleet or self.config.gpus, self.hardware.power.value)
        return {
            "run, rented": made.final,
            "run, owned instead": run.owned * again,
            "run, owned, straight line": run.straight * again,
            "development, compute": made.compute,
            "development, people": made.people,
            "development": made.total,
            "organisation-year, rented": year.rented + year.people,
            "organisation-year, owned instead": year.owned + year.people,
        }

    def ranges(self, *, seed: int = 0) -> dict[str, Quantiles]:
        """5, 50 and 95% of every scope, over draws of all assumptions that have a range."""
        return sampled(self.assumptions, self.results, seed=seed)

    def tornado(self) -> list[Swing]:
        """What each assumption alone makes of the development's total, the widest first."""
        return tornado(self.assumptions, lambda of: self.results(of)["development"])

    def sensitivities(self) -> dict[str, Sensitivity]:
        """Of every assumption that has a range."""
        found = {}
        for name, each in self.assumptions.items():
            if each.low is None or each.high is None:
                continue
            low, high = (self._outcomes({**self.values, name: end}) for end in (each.low, each.high))
            moved = next((of for of in low if low[of] != high[of]), "development")
            found[name] = Sensitivity(of=moved, at_low=low[moved], at_high=high[moved])
        return found

    def _outcomes(self, of: Mapping[str, float]) -> dict[str, float]:
        run = self.run_under(of)
        progress = of["hardware_progress"] + of["algorithmic_progress"]
        return {
            "development": development(of, run).total,
            "run, owned instead": run.owned,
            "run, owned, straight line": run.straight,
            "run, a year later": run.rent * 10**-progress,
        }

    def trend(self) -> list[Year]:
        """The run's rent in the years around its own."""
        base = self.hardware.year if self.config.year is None else self.config.year
        return trend(self.assumptions, self.run.rent, base, range(base - YEARS, base + YEARS + 1))
