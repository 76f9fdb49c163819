"""`rmsnorm` and `layernorm` on paper.

Sources: Zhang and Sennrich, arXiv 1910.07467; Ba et al., arXiv 1607.06450.
"""

from collections.abc import Iterable

from composeformer.config import Config, config, field
from composeformer.contracts import Constant, Cost, Declared, Phase, Saved, Weight
from composeformer.conventions import Convention, Shift
from composeformer.site import Site


@config
class RMSNorm(Config):
    """weight * x / sqrt(mean(x^2) + eps). Initial values: ones."""

    eps: float = field(default=1e-6, above=0.0, help="Added to the mean square.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Weight(name="weight", shape=(site.width,), init=Constant(1.0))

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        if phase == "train":
            yield Saved(name="input", elements=site.width, dtype="float32", recompute="none")
            yield Saved(name="scale", elements=1, dtype="float32", recompute="none")
            yield Saved(name="normed", elements=site.width, recompute="none")
            yield Saved(name="input", elements=site.width, recompute="selective")

    def conventions(self, site: Site) -> Iterable[Convention]:
        # As Gemma has it (arXiv 2403.08295), so that weight decay pulls towards one.
        less = Shift(tensor="weight", by=-1.0)
        yield Convention(name="weight", usual="whole", other="less one", changes=(less,))


@config
class LayerNorm(Config):
    """weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias. Initial values: ones and zeros."""

    eps: float = field(default=1e-5, above=0.0, help="Added to the variance.")
    bias: bool = field(default=True, help="Whether there is a learnt shift.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Weight(name="weight", shape=(site.width,), init=Constant(1.0))
        if self.bias:
            yield Weight(name="bias", shape=(site.width,), init=Constant(0.0))

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        if phase == "train":
            yield Saved(name="input", elements=site.width, dtype="float32", recompute="none")
            yield Saved(name="mean and scale", elements=2, dtype="float32", recompute="none")
            yield Saved(name="input", elements=site.width, recompute="selective")
