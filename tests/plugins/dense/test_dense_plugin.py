"""What the plugin registers, and that describing it imports no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from composeformer.config import facts_of
from composeformer.lazy import load
from composeformer_dense import plugin

README = Path(plugin.__file__).parents[1] / "README.md"
components = pytest.mark.parametrize("component", plugin.COMPONENTS, ids=lambda c: f"{c.slot}-{c.kind}")


def test_the_description_plane_imports_no_torch():
    code = "import sys, composeformer_dense.plugin as p; p.compose_components(); p.compose_dialects(); "
    code += "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@components
def test_every_part_has_a_reference_and_its_modules_exist(component):
    assert "reference" in [i.name for i in component.implementations]
    for implementation in component.implementations:
        assert callable(load(implementation.module))


@components
def test_every_field_is_documented(component):
    assert component.summary
    for fact in facts_of(component.config).values():
        assert fact.help.endswith("."), fact.name


def test_one_kind_of_each_end_is_the_default():
    defaults = {(c.slot, c.kind) for c in plugin.COMPONENTS if c.default}
    assert defaults == {
        ("embedding", "token"),
        ("head", "linear"),
        ("residual", "pre-norm"),
        ("precision", "full"),
    }


def test_dialects_are_the_toml_files_beside_it():
    files = list(plugin.compose_dialects())
    assert all(path.suffix == ".toml" and path.is_file() for path in files)


def test_every_kind_is_in_the_readme_and_its_spec_builds():
    import torch

    from composeformer.assemble import build
    from composeformer.spec import Spec

    text = README.read_text()
    for component in plugin.COMPONENTS:
        assert f"`{component.kind}`" in text
    snippet = text.partition("```toml\n")[2].partition("```")[0]
    model = build(Spec.from_toml(snippet), device="meta")
    assert model(torch.zeros(1, 3, dtype=torch.int64, device="meta")).logits.shape[:2] == (1, 3)
