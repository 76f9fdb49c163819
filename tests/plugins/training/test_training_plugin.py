"""The training plugin registers without torch, and its fields' limits hold when a spec is read."""

import subprocess
import sys

import pytest

from composeformer import lazy
from composeformer.errors import SpecError
from composeformer.spec import Spec
from composeformer_training.plugin import COMPONENTS


def test_registering_imports_no_torch() -> None:
    program = "import sys, composeformer_training.plugin as p; list(p.compose_components())"
    program += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_implementation_exists() -> None:
    names = [i.module for component in COMPONENTS for i in component.implementations]
    assert len(names) == 3
    assert all(callable(lazy.load(name)) for name in names)


def test_a_spec_that_says_nothing_gets_next_token_and_adamw() -> None:
    spec = Spec.load("tiny-llama")
    assert [spec.single(slot).kind for slot in ("objective", "optimizer")] == ["next-token", "adamw"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", -0.1),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.eps", "small"),
        ("objective.chunk_tokens", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_path(path: str, value: object) -> None:
    kinds = {"optimizer.kind": "adamw", "objective.kind": "next-token"}
    with pytest.raises(SpecError) as caught:
        Spec.load("tiny-llama").with_({**kinds, path: value})
    assert len(caught.value.lines) == 1
    assert path in caught.value.lines[0]
