"""The `pre-norm` residual: stream + sublayer(norm(stream)), and a norm at the end.

Source: arXiv 2002.04745.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from composeformer.tensors import Batch, Output, merge
from composeformer_dense.configs import residual

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class PreNorm(nn.Module):
    """At a layer it has the norms of its sublayers, at the model's ends the last norm."""

    def __init__(self, config: residual.PreNorm, site: "TensorSite") -> None:
        super().__init__()
        for name in site.sublayers:
            setattr(self, f"{name}_norm", site.part(f"{name}_norm"))
        if site.layer is None:
            self.norm = site.part("norm")

    def forward(
        self,
        stream: Float[Tensor, "B T D"],
        batch: Batch,
        sublayers: Mapping[str, Callable[[Tensor], Output]],
    ) -> Output:
        """Each sublayer once, in order; the stream keeps its dtype."""
        aux = []
        for name, sublayer in sublayers.items():
            output = sublayer(getattr(self, f"{name}_norm")(stream))
            stream = stream + output.hidden.to(stream.dtype)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    def open(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The stream that the embeddings start."""
        return x

    def close(self, stream: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The stream as the head reads it."""
        hidden: Tensor = self.norm(stream)
        return hidden
