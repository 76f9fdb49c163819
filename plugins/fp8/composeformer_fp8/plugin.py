"""Registers the scaled precision policies and codecs. Imports no torch."""

from collections.abc import Iterable

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_fp8.configs.codec_tiles import Tiles
from composeformer_fp8.configs.scaled import FP8Block, FP8Tensor, fast_needs

SCALED = (
    Implementation("fast", "composeformer_fp8.policy:Quick", needs=fast_needs),
    Implementation("reference", "composeformer_fp8.policy:Reference"),
)

COMPONENTS: tuple[Component, ...] = (
    Component(
        "precision", "fp8-block", FP8Block, SCALED, summary="FP8 products, a scale for 128 or 128 x 128 elements"
    ),
    Component("precision", "fp8-tensor", FP8Tensor, SCALED, summary="FP8 products, a scale for a tensor"),
    Component(
        "codec",
        "f8-1x128",
        Tiles,
        (Implementation("reference", "composeformer_fp8.codec_tiles:TilesCodec"),),
        summary="E4M3 rows, a scale for 128 features",
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS
