"""The plan: the tree of parts with every tensor they declare, from the description plane alone."""

import subprocess
import sys
from typing import Any

import attrs
import pytest
from hypothesis import given, settings

from composeformer.config import Config, config
from composeformer.contracts import Component, Implementation, Linear, Weight
from composeformer.errors import PluginError, SpecError
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.spec import Spec
from composeformer.spec.document import from_data
from composeformer.testing.specs import specs

ROOT_COMMANDS = [
    ["--help"],
    ["check", "tiny-llama"],
    ["show", "tiny-llama"],
    ["show", "tiny-llama", "--values", "--json"],
    ["cost", "tiny-llama"],
    ["schema"],
    ["plugins"],
    ["plugins", "info", "dense"],
    ["doctor", "--help"],
    ["--version"],
]


@settings(deadline=None, max_examples=50)
@given(specs())
def test_the_tree_has_every_part_once_at_its_path(data: dict[str, Any]) -> None:
    found = Spec.from_dict(data)
    nodes = list(found.plan.nodes())
    paths = [node.path for node in nodes]
    assert len(set(paths)) == len(paths)
    assert len(found.plan.layers) == len(found.layers)
    for node in nodes:
        assert node.part.slot == node.slot
        for name, child in node.children.items():
            assert child.path == f"{node.path}.{name}"
    tensors = [name for node in nodes for name, _ in node.tensors()]
    assert len(set(tensors)) == len(tensors)
    assert set(tensors) == {*found.plan.tensors, *found.plan.aliases}
    assert set(found.plan.aliases) == ({"head.projection.weight"} if found.model.tie_embeddings else set())


def test_a_residual_joins_what_its_layer_has() -> None:
    found = Spec.load("tiny-llama").with_(layers=[{}, {"mixer": False}, {"ffn": False}])
    children = [list(layer["residual"].children) for layer in found.plan.layers]
    assert children == [["mixer_norm", "ffn_norm"], ["ffn_norm"], ["mixer_norm"]]
    assert list(found.plan.residual.children) == ["norm"]


def odd(**component: Any) -> Registry:
    """The built-in parts and one more."""
    defaults: dict[str, Any] = {
        "slot": "ffn",
        "kind": "odd",
        "implementations": (Implementation("reference", "never.imported:X"),),
    }
    info = PluginInfo(
        name="odd",
        distribution="odd",
        version="1",
        origin="",
        status="loaded",
        components=(Component(**{**defaults, **component}),),
    )
    return Registry([*current().registry.infos, info])


def with_odd(registry: Registry, **tables: Any) -> Spec:
    data = Spec.load("tiny-llama").to_dict()
    return Spec(from_data(data | {"ffn": {"kind": "odd"}, "layers": [{}]} | tables), registry)


@config
class Twice(Config):
    def tensors(self, site: Any) -> Any:
        yield Weight(name="a", shape=(1,))
        yield Linear(name="a", inputs=1, outputs=1)


@config
class Strange(Config):
    def tensors(self, site: Any) -> Any:
        yield "a"


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (Twice, "ffn odd at layers.0.ffn: tensors declares a twice"),
        (Strange, "ffn odd at layers.0.ffn: tensors declares a str"),
    ],
)
def test_a_config_that_declares_wrongly_is_named(cls: type[Config], told: str) -> None:
    with pytest.raises(PluginError, match=told):
        with_odd(odd(config=cls))


@config
class Alias(Config):
    shape = (64,)

    def tensors(self, site: Any) -> Any:
        yield Weight(name="a", shape=(3,), same_as="embedding.weight")


def test_a_shared_tensor_must_exist_in_the_same_shape() -> None:
    with pytest.raises(
        SpecError, match=r"ffn.kind = .*the tensor embedding.weight, which has shape \(256, 64\)"
    ):
        with_odd(odd(config=Alias))


def test_the_plan_is_the_same_whatever_is_built() -> None:
    found = Spec.load("llama-3.1-405b")
    assert len(found.plan.tensors) == 126 * 9 + 3
    assert all(attrs.has(type(linear)) for linear in found.plan.linears.values())


@pytest.mark.parametrize("arguments", ROOT_COMMANDS, ids=" ".join)
def test_the_description_plane_never_imports_torch(arguments: list[str]) -> None:
    code = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'rich', 'numpy'} & set(sys.modules))))\n"
        f"sys.argv = ['compose', *{arguments!r}]\n"
        "runpy.run_module('composeformer', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy = done.stdout.rpartition("HEAVY ")[2].strip()
    light = arguments[0] in ("--help", "check", "schema", "doctor", "--version") or "--json" in arguments
    assert heavy in (["[]"] if light else ["[]", "['rich']"])


@config
class Fails(Config):
    def tensors(self, site: Any) -> Any:
        return {}["k"]


@config
class FailsToValidate(Config):
    def validate(self, site: Any) -> Any:
        raise RuntimeError("two\nlines")


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (Fails, "ffn odd at layers.0.ffn: tensors: KeyError: 'k'"),
        (FailsToValidate, "ffn odd at layers.0.ffn: validate: RuntimeError: two lines"),
    ],
)
def test_what_a_parts_own_code_raises_is_told_with_its_place(cls: type[Config], told: str) -> None:
    with pytest.raises(PluginError, match=told):
        with_odd(odd(config=cls))
