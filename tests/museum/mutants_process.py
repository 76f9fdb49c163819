"""Parts that change what a whole process shares: PyTorch's defaults, switches and generators."""

from collections.abc import Iterator
from typing import Any

import torch
from museum_kit import mutant, replaced


def before_forward(place: str, does: Any) -> Any:
    """`place` with `does()` at the start of every call."""

    def wrong(forward: Any) -> Any:
        def also(self: Any, *args: Any, **more: Any) -> Any:
            does()
            return forward(self, *args, **more)

        return also

    return replaced(place, wrong)


@mutant(
    "forward-seeds-the-process",
    "ffn",
    "swiglu",
    "a forward seeds the process's generator, so that all noise of others is the same at every step",
    source="seeds set for the reproducible initial values of one part, left in its forward",
    by="everywhere.process",
)
def forward_seeds_the_process() -> Iterator[None]:
    with before_forward("composeformer_dense.ffn:FeedForward.forward", lambda: torch.manual_seed(0)):
        yield


@mutant(
    "default-dtype-is-left-changed",
    "norm",
    "rmsnorm",
    "a part that is built sets PyTorch's default dtype and does not set it back",
    source="set_default_dtype around the construction of a model in many inference scripts",
    by="everywhere.process",
)
def default_dtype_is_left_changed() -> Iterator[None]:
    before = torch.get_default_dtype()

    def wrong(init: Any) -> Any:
        def setting(self: Any, *args: Any) -> None:
            init(self, *args)
            torch.set_default_dtype(torch.float64)

        return setting

    with replaced("composeformer_dense.norms:RMSNorm.__init__", wrong):
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@mutant(
    "gradients-are-left-off",
    "norm",
    "layernorm",
    "a part switches gradients off for a statistic of its own and leaves them off",
    source="set_grad_enabled as a statement in place of a context",
    by="everywhere.process",
)
def gradients_are_left_off() -> Iterator[None]:
    def wrong(forward: Any) -> Any:
        def off(self: Any, *args: Any) -> Any:
            found = forward(self, *args)
            torch.set_grad_enabled(False)
            return found

        return off

    with replaced("composeformer_dense.norms:LayerNorm.forward", wrong):
        try:
            yield
        finally:
            torch.set_grad_enabled(True)


@mutant(
    "products-are-made-fast",
    "mixer",
    "gqa",
    "a part asks for faster, coarser float32 products of the whole process",
    source="set_float32_matmul_precision at the head of many training scripts' model files",
    by="everywhere.process",
)
def products_are_made_fast() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        with before_forward(
            "composeformer_dense.attention:Attention.forward",
            lambda: torch.set_float32_matmul_precision("medium"),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
