"""`pre-norm`: the residual stream on paper. Source: Xiong et al., arXiv 2002.04745."""

from collections.abc import Iterable

from composeformer.config import Config, config, part
from composeformer.contracts import Cost, Declared, Part, Phase, Saved
from composeformer.conventions import Convention, Swap
from composeformer.site import Site


@config
class PreNorm(Config):
    """stream + sublayer(norm(stream)) for each sublayer in order, and one norm at the end of the model."""

    norm: Part = part("norm", help="Normalises each sublayer's input and the last hidden states.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        if site.layer is None:
            yield site.part(self.norm, "norm")
        for sublayer in site.sublayers:
            yield site.part(self.norm, f"{sublayer}_norm")

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        if phase == "train":
            yield Saved(name="nothing")  # the gradient of a sum needs neither addend

    def conventions(self, site: Site) -> Iterable[Convention]:
        if len(site.sublayers) == 2:
            first, second = (f"{sublayer}_norm.weight" for sublayer in site.sublayers)
            swap = Swap(first=first, second=second)
            yield Convention(
                name="norms of the sublayers", usual="as named", other="exchanged", changes=(swap,)
            )
