"""What training costs in hours, money, energy and people: assumptions with sources, three scopes, ranges.

The formulas are those of Cottier et al., The rising costs of training frontier AI models (arXiv 2405.21015),
where a module does not say otherwise.
"""

from composeformer.costs.economics.assumptions import Assumption, assumptions
from composeformer.costs.economics.development import Development, Fleet, development, fleet
from composeformer.costs.economics.run import Run, hours_of, price, tokens_of
from composeformer.costs.economics.sampling import Quantiles, Swing, sampled, tornado
from composeformer.costs.economics.trend import Year, trend

__all__ = [
    "Assumption",
    "Development",
    "Fleet",
    "Quantiles",
    "Run",
    "Swing",
    "Year",
    "assumptions",
    "development",
    "fleet",
    "hours_of",
    "price",
    "sampled",
    "tokens_of",
    "tornado",
    "trend",
]
