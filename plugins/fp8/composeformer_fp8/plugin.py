"""Registers the scaled precision policies and codecs. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path

from composeformer.contracts import Component, Implementation
from composeformer.hookspecs import hookimpl
from composeformer_fp8.configs.codec_blocks import Blocks
from composeformer_fp8.configs.codec_tiles import Tiles
from composeformer_fp8.configs.int8 import Int8, Rows
from composeformer_fp8.configs.mx import MXFP8
from composeformer_fp8.configs.scaled import FP8Block, FP8Tensor, fast_needs, triton_needs

# Of what shares no scale with another token; only powers of two leave every code as it is.
ALONE = ("rows-alone", "powers-of-two", "repeats", "confined")
# Of codecs whose scales are found again from what they gave.
EXACT = ("repeats-codes", "powers-of-two")

SCALED = (
    Implementation("triton", "composeformer_fp8.kernels.products:Kernels", needs=triton_needs),
    Implementation("fast", "composeformer_fp8.policy:Quick", needs=fast_needs),
    Implementation("reference", "composeformer_fp8.policy:Reference"),
)

COMPONENTS: tuple[Component, ...] = (
    Component(
        "precision",
        "fp8-block",
        FP8Block,
        SCALED,
        summary="FP8 products, a scale for 128 or 128 x 128 elements",
        strategy="composeformer_fp8.testing:fp8_blocks",
        claims=ALONE,
    ),
    Component(
        "precision",
        "fp8-tensor",
        FP8Tensor,
        SCALED,
        summary="FP8 products, a scale for a tensor",
        strategy="composeformer_fp8.testing:fp8_tensors",
        claims=("powers-of-two", "repeats", "confined"),
    ),
    Component(
        "precision",
        "mxfp8",
        MXFP8,
        SCALED,
        summary="FP8 products, a power of two for 32 elements",
        claims=ALONE,
    ),
    Component(
        "precision",
        "int8",
        Int8,
        (Implementation("reference", "composeformer_fp8.int8:Int8Policy"),),
        summary="8-bit integer weights for inference",
        claims=ALONE,
    ),
    Component(
        "codec",
        "int8-row",
        Rows,
        (Implementation("reference", "composeformer_fp8.int8:RowsCodec"),),
        summary="integers, a scale for each output",
        claims=EXACT,
    ),
    Component(
        "codec",
        "f8-128x128",
        Blocks,
        (Implementation("reference", "composeformer_fp8.codec_blocks:BlocksCodec"),),
        summary="E4M3 matrices, a scale for 128 x 128 elements",
        claims=EXACT,
    ),
    Component(
        "codec",
        "f8-1x128",
        Tiles,
        (Implementation("reference", "composeformer_fp8.codec_tiles:TilesCodec"),),
        summary="E4M3 rows, a scale for 128 features",
        claims=EXACT,
    ),
)


@hookimpl
def compose_components() -> Iterable[Component]:
    return COMPONENTS


@hookimpl
def compose_dialects() -> Iterable[Path]:
    return sorted((Path(__file__).parent / "dialects").glob("*.toml"))
