"""Bugs of codecs: which scale is whose, at edges and in stacks, and what is written that can not be read."""

from collections.abc import Iterator

from museum_kit import mutant, replaced

QUANTISE, BLOCKS = "composeformer_fp8.quantise", "composeformer_fp8.codec_blocks"
CONFIG = "composeformer_fp8.configs.codec_blocks:Blocks"


@mutant(
    "decode-divides",
    "codec",
    "f8-128x128",
    "decoding divides by `weight_scale_inv`",
    source="pitfalls 4.8: weight_scale_inv multiplies",
)
def decode_divides() -> Iterator[None]:
    def wrong(dequantise):
        return lambda codes, scales, block, dtype: dequantise(codes, 1 / scales, block, dtype)

    with replaced(f"{BLOCKS}:dequantise", wrong):
        yield


@mutant(
    "scale-of-the-next-binade",
    "codec",
    "f8-128x128",
    "scales are 2^ceil(log2(amax / 448)), which what was decoded does not have again",
    source="DeepGEMM's ceil_to_ue8m0",
)
def scale_of_the_next_binade() -> Iterator[None]:
    def wrong(scale):
        import torch

        def upwards(amax, form, rule):
            found = torch.exp2((amax / form.largest).clamp(min=2.0**-126).log2().ceil())
            return found.masked_fill(amax == 0, 1.0)

        return upwards

    with replaced(f"{QUANTISE}:scale", wrong):
        yield


@mutant(
    "smallest-magnitude-too-large",
    "codec",
    "f8-128x128",
    "magnitudes are at least 1e-4",
    source="DeepGEMM's per_block_cast_to_fp8 has clamp(1e-4)",
)
def smallest_magnitude_too_large() -> Iterator[None]:
    with replaced(f"{QUANTISE}:SMALLEST_SCALE", lambda before: 1e-4 / 448):
        yield


@mutant(
    "scales-of-whole-blocks",
    "codec",
    "f8-128x128",
    "a dimension is declared to have floor(n / 128) scales",
    source="pitfalls 4.8: 576 rows of kv_a are 4.5 blocks",
)
def scales_of_whole_blocks() -> Iterator[None]:
    def wrong(stored):
        import attrs

        def floor(self, weight):
            codes, scales = stored(self, weight)
            shape = (*weight.shape[:-2], *(max(1, n // 128) for n in weight.shape[-2:]))
            return codes, attrs.evolve(scales, shape=shape)

        return floor

    with replaced(f"{CONFIG}.stored", wrong):
        yield


@mutant(
    "rows-from-a-blocks-edge",
    "codec",
    "f8-128x128",
    "the scales of some rows begin with those of the first of them",
    source="pitfalls 4.8: 80 of 576 rows wrong at 8 ranks",
)
def rows_from_a_blocks_edge() -> Iterator[None]:
    def wrong(decode):
        def shifted(codes, scales, out, start, stop):
            decode(codes[start:stop], scales[start // 128 :], out, 0, stop - start)

        return shifted

    with replaced(f"{BLOCKS}:_decode", wrong):
        yield


@mutant(
    "cut-within-a-block",
    "codec",
    "f8-128x128",
    "codes are cut where the part begins, not where its block does",
    source="pitfalls 4.8: functions of NeMo AutoModel on Shard(0)",
)
def cut_within_a_block() -> Iterator[None]:
    def wrong(cut):
        def inside(self, dim, start, stop):
            _, scales = cut(self, dim, start, stop)
            return (start, stop), scales

        return inside

    with replaced(f"{CONFIG}.cut", wrong):
        yield


@mutant(
    "stack-is-one-matrix",
    "codec",
    "f8-128x128",
    "a stack of experts is flattened, so that blocks cross from one to the next",
    source="pitfalls 2.21: 3-D flattened",
)
def stack_is_one_matrix() -> Iterator[None]:
    def wrong(quantise):
        def flattened(x, block, form, rule):
            if x.ndim < 3:
                return quantise(x, block, form, rule)
            from composeformer_fp8.quantise import spread

            codes, scales = quantise(x.flatten(0, 1), block, form, rule)
            each = spread(scales, block, (codes.shape[0], codes.shape[1])).view(x.shape)
            return codes.view(x.shape), each[:, ::128, ::128].contiguous()

        return flattened

    with replaced(f"{BLOCKS}:quantise", wrong):
        yield


@mutant(
    "infinity-is-a-scale",
    "codec",
    "f8-128x128",
    "an infinity is the magnitude of its block, whose other numbers become zero",
    source="pitfalls 2.22: blocks with infinities",
)
def infinity_is_a_scale() -> Iterator[None]:
    with replaced(f"{QUANTISE}:_finite", lambda finite: lambda x: x):
        yield


@mutant(
    "scales-are-not-looked-at",
    "codec",
    "f8-128x128",
    "scales of NaN are read from a file as if they were scales",
    source="pitfalls 3: safetensors takes any NaN",
)
def scales_are_not_looked_at() -> Iterator[None]:
    with replaced(f"{BLOCKS}:BlocksCodec.wrong", lambda wrong: lambda self, place, part: None):
        yield


@mutant(
    "coded-in-half",
    "codec",
    "int8-row",
    "scales are taken in the dtype of what comes",
    source="amax / 127 in bfloat16",
)
def coded_in_half() -> Iterator[None]:
    def wrong(encode):
        import torch

        def narrow(self, value):
            if value.dtype != torch.bfloat16:
                return encode(self, value)
            scales = (value.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126)
            return (value / scales).round().clamp(-127, 127).to(torch.int8), scales

        return narrow

    with replaced("composeformer_fp8.int8:RowsCodec.encode", wrong):
        yield
