"""Tensors that a part declares as integers are stored and read as those, beside weights of any float dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from composeformer.config import Config, config
from composeformer.contracts import Component, Implementation, Weight
from composeformer.errors import FolderError
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.spec import Spec
from composeformer.spec.document import from_data
from composeformer.store.accounting import lookup
from composeformer.store.lock import NATIVE


@config
class Table(Config):
    """An ffn with a table of integers, as hash routing has."""

    def tensors(self, site: Any) -> Any:
        yield Weight(name="table", shape=(4,), trains=False, dtype="int64")


class Named:
    """Tensors as a source of a folder's."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> dict[str, Tensor]:
        return self._tensors

    def get(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        return self._tensors[name]


def spec_of_a_table() -> Spec:
    component = Component("ffn", "table", Table, (Implementation("reference", "none:None"),))
    info = PluginInfo(
        name="t", distribution="t", version="1", origin="", status="loaded", components=(component,)
    )
    data = Spec.load("tiny-llama").to_dict()
    data |= {"ffn": {"kind": "table"}, "layers": [{}]}
    return Spec(from_data(data), Registry([*current().registry.infos, info]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int32])
def test_a_table_of_integers_is_read_as_such_and_as_nothing_else(dtype: torch.dtype) -> None:
    spec = spec_of_a_table()
    stored = {name: torch.zeros(weight.shape) for name, weight in spec.formats.stored.items()}
    name = "layers.0.ffn.table"
    source: Any = Named({**stored, name: torch.arange(4, dtype=dtype)})
    if dtype != torch.int64:
        kind = str(dtype).removeprefix("torch.")
        with pytest.raises(FolderError, match=f"{name}: is stored as {kind}; .* keeps it as int64"):
            lookup(spec, NATIVE, source, Path("m"))
        return
    assert torch.equal(lookup(spec, NATIVE, source, Path("m"))(name, None), torch.arange(4))
