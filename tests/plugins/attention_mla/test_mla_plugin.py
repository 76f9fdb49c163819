"""What the plugin registers, and that describing it imports no torch."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import composeformer as cf
from composeformer.config import facts_of

README = Path(__file__).resolve().parents[3] / "plugins" / "attention_mla" / "README.md"


@pytest.fixture(scope="module")
def component():
    from composeformer_attention_mla import plugin

    (found,) = plugin.compose_components()
    return found


def test_describing_mla_imports_no_torch():
    code = "import sys, composeformer_attention_mla.plugin as p; list(p.compose_components()); "
    code += "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_it_is_mla_and_its_modules_exist(component):
    assert (component.slot, component.kind) == ("mixer", "mla")
    assert [i.name for i in component.implementations] == ["expanded", "absorbed", "reference"]
    for implementation in component.implementations:
        module, _, name = implementation.module.partition(":")
        assert issubclass(getattr(import_module(module), name), torch.nn.Module)


def test_every_field_is_documented(component):
    assert component.summary
    for fact in facts_of(component.config).values():
        assert fact.help.endswith("."), fact.name


def test_the_spec_of_the_readme_builds():
    text = README.read_text(encoding="utf-8")
    model = cf.build(cf.Spec.from_toml(text.partition("```toml\n")[2].partition("```")[0]), device="meta")
    assert model(torch.zeros(1, 3, dtype=torch.int64, device="meta")).logits.shape[:2] == (1, 3)
