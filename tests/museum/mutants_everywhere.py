"""Bugs that any part can have: implementations that differ, state that is kept, configs that do not tell."""

from collections.abc import Iterator
from copy import copy
from typing import Any

import attrs
import torch
from museum_kit import mutant, replaced
from torch import nn

from composeformer.contracts import Core

GQA = "composeformer_dense.attention:Attention"
MLA = "composeformer_attention_mla.reference:LatentAttention"


@mutant(
    "absorbed-without-the-scale",
    "mixer",
    "mla",
    "absorbed decoding divides scores by the root of the latent's width, not of the head's",
    source="pitfalls 2, row 25; scale read off the shape of absorbed queries in MLA ports",
    implementation="absorbed",
)
def absorbed_without_the_scale() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def scaled(self: Any, *args: Any) -> Any:
            other = copy(self)
            other.scale = (self.rank + self.rope) ** -0.5
            return attend(other, *args)

        return scaled

    with replaced("composeformer_attention_mla.absorbed:Absorbed.attend", wrong):
        yield


@mutant(
    "heads-share-keys-in-turn",
    "mixer",
    "gqa",
    "query head h reads key head h modulo their number: keys tiled in place of repeated",
    source="repeat in place of repeat_interleave in many grouped-query ports",
    by="everywhere.reference",
)
def heads_share_keys_in_turn() -> Iterator[None]:
    def wrong(attend: Any) -> Any:
        def tiled(self: Any, q: Any, k: Any, v: Any, seen: Any) -> Any:
            groups = q.shape[2] // k.shape[2]
            return (
                attend(self, q, k, v, seen)
                if groups == 1
                else attend(self, q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1), seen)
            )

        return tiled

    with replaced(f"{GQA}.attend", wrong):
        yield


@mutant(
    "norm-weight-in-another-dtype",
    "norm",
    "rmsnorm",
    "a norm's weight is made in half precision, whatever the policy says",
    source="pitfalls 2, row 19; checkpoints cast whole",
)
def norm_weight_in_another_dtype() -> Iterator[None]:
    def wrong(init: Any) -> Any:
        def halved(self: Any, config: Any, site: Any) -> None:
            init(self, config, site)
            self.weight = nn.Parameter(self.weight.half())

        return halved

    with replaced("composeformer_dense.norms:RMSNorm.__init__", wrong):
        yield


@mutant(
    "core-counts-one-product",
    "mixer",
    "gqa",
    "attention's cost counts the scores and not what they mix",
    source="pitfalls 1, row 20: torchtitan issue 452",
)
def core_counts_one_product() -> Iterator[None]:
    def wrong(cost: Any) -> Any:
        def half(self: Any, site: Any, phase: Any) -> Any:
            for each in cost(self, site, phase):
                yield attrs.evolve(each, per_key=each.per_key / 2) if isinstance(each, Core) else each

        return half

    with replaced("composeformer_dense.configs.attention:GQA.cost", wrong):
        yield


@mutant(
    "mixer-keeps-its-last-input",
    "mixer",
    "gqa",
    "a module keeps what it was last given, and with it that graph's memory",
    source="pitfalls 2, row 8; attention maps kept for plotting",
)
def mixer_keeps_its_last_input() -> Iterator[None]:
    def wrong(forward: Any) -> Any:
        def keeping(self: Any, x: Any, *args: Any) -> Any:
            self.last = x
            return forward(self, x, *args)

        return keeping

    with replaced(f"{GQA}.forward", wrong):
        yield


@mutant(
    "first-forward-differs",
    "norm",
    "rmsnorm",
    "noise in training that is drawn again when activations are recomputed",
    source="pitfalls 2, rows 8 and 12: recomputation that does not repeat the forward",
)
def first_forward_differs() -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)

    def wrong(forward: Any) -> Any:
        def noisy(self: Any, x: Any) -> Any:
            noise = torch.rand((), generator=generator, dtype=torch.float64)
            return forward(self, x) * (1 + 0.01 * noise.to(x.dtype))

        return noisy

    with replaced("composeformer_dense.norms:RMSNorm.forward", wrong):
        yield


@mutant(
    "copy-computes-with-the-old-weights",
    "mixer",
    "mla",
    "a copy of a model goes on computing with the weights of the first",
    source="bound methods kept in an instance's dict survive deepcopy; lazily patched forwards",
    implementation="absorbed",
)
def copy_computes_with_the_old_weights() -> Iterator[None]:
    def wrong(init: Any) -> Any:
        def bound(self: Any, config: Any, site: Any) -> None:
            init(self, config, site)
            self.__dict__["_projections"] = (self.o, self.kv_a)
            object.__setattr__(self, "forward", _Bound(self))

        return bound

    with replaced(f"{MLA}.__init__", wrong):
        yield


class _Bound:
    """A forward that a copy shares with the module it was made for."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return type(self.module).forward(self.module, *args)

    def __deepcopy__(self, memo: Any) -> Any:
        return self


@mutant(
    "cast-rounds-the-bias",
    "router",
    "sigmoid-bias",
    "a cast of the model rounds the balancing bias, which is to stay in float32",
    source="pitfalls 2, row 4: Megatron-LM issue 1482",
)
def cast_rounds_the_bias() -> Iterator[None]:
    def wrong(_: Any) -> Any:
        return nn.Module._apply

    with (
        replaced("composeformer.decoder:Model._apply", wrong),
        replaced("composeformer_moe.sigmoid_bias:SigmoidBiasRouter._apply", wrong),
    ):
        yield


@mutant(
    "initial-values-of-the-process",
    "ffn",
    "swiglu",
    "initial values are drawn from the process's generator, so that they follow from all that was drawn before",
    source="pitfalls 1, row 24: torchtitan PR 1363",
)
def initial_values_of_the_process() -> Iterator[None]:
    def wrong(draw: Any) -> Any:
        return lambda value, std, key: value.normal_(0.0, std)

    with replaced("composeformer.init:_draw", wrong):
        yield


@mutant(
    "keys-are-detached",
    "mixer",
    "gqa",
    "keys are read as if from a cache, without a gradient",
    source="a detach that is right in decoding, left in training",
)
def keys_are_detached() -> Iterator[None]:
    def wrong(heads: Any) -> Any:
        def detached(self: Any, x: Any, batch: Any) -> Any:
            q, k, v = heads(self, x, batch)
            return q, k.detach(), v

        return detached

    with replaced(f"{GQA}.heads", wrong):
        yield


@mutant(
    "queries-have-half-their-gradient",
    "mixer",
    "gqa",
    "queries get half of their gradient",
    source="pitfalls 2, row 15: gradients that are scaled wrongly",
)
def queries_have_half_their_gradient() -> Iterator[None]:
    def wrong(heads: Any) -> Any:
        def scaled(self: Any, x: Any, batch: Any) -> Any:
            q, k, v = heads(self, x, batch)
            return 0.5 * q + 0.5 * q.detach(), k, v

        return scaled

    with replaced(f"{GQA}.heads", wrong):
        yield


@mutant(
    "config-can-be-changed",
    "ffn",
    "swiglu",
    "a config that is an ordinary class: whoever holds it can change the spec",
    source="pitfalls 1, row 6; mutable dataclasses as configs",
)
def config_can_be_changed() -> Iterator[None]:
    with replaced("composeformer_dense.configs.ffn:SwiGLU.__setattr__", lambda _: object.__setattr__):
        yield


@mutant(
    "norm-eps-is-not-read",
    "norm",
    "layernorm",
    "a norm takes an eps of its own in place of the config's",
    source="pitfalls 2, row 20: transformers issue 44261, torchtitan PR 4395",
)
def norm_eps_is_not_read() -> Iterator[None]:
    def wrong(init: Any) -> Any:
        def own(self: Any, config: Any, site: Any) -> None:
            init(self, attrs.evolve(config, eps=1e-5), site)

        return own

    with replaced("composeformer_dense.norms:LayerNorm.__init__", wrong):
        yield


@mutant(
    "up-is-kept-and-not-told",
    "ffn",
    "swiglu",
    "the product of a gate and a map keeps both, and only the gate is told",
    source="estimates of activation memory that count the inputs of linear maps alone",
)
def up_is_kept_and_not_told() -> Iterator[None]:
    def wrong(cost: Any) -> Any:
        def told(self: Any, site: Any, phase: Any) -> Any:
            return [each for each in cost(self, site, phase) if each.name != "up"]

        return told

    with replaced("composeformer_dense.configs.ffn:SwiGLU.cost", wrong):
        yield
