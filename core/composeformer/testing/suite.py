"""The laws in a pytest suite: one line makes a test of every law for every component of a plugin.

```python
test_laws = laws_of("my-plugin")
```

The number of cases is each law's own, multiplied by what the loaded hypothesis profile says beyond its usual 100;
cases are the same in every run unless COMPOSE_LAWS_SEED says otherwise.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from composeformer.testing.certificate import Finding, examine, laws_to_try
from composeformer.testing.foreign import DIALECT, dialect_findings
from composeformer.testing.law import Law
from composeformer.testing.models import Models, models
from composeformer.testing.subject import Subject, subjects

USUAL = 100


def laws_of(plugin: str | None = None, *, slot: str | None = None) -> Callable[..., Any]:
    """A parametrised test of a plugin, or of all plugins; of one slot (`model`: of whole models with its parts), or of
    all. Its dialects are tried as they are
    collected: that takes milliseconds.

    Raises ComposeError for a plugin that is not loaded, or a claim that is no law.
    """
    every: list[Subject | Models] = [*subjects(plugin), *models(plugin)]
    cases = [
        pytest.param(law, tried, id=f"{law.id}-{tried.kind}-{tried.implementation.name}")
        for tried in every
        if slot in (None, tried.slot)
        for law in laws_to_try(tried)
    ]
    if slot in (None, DIALECT):
        cases += [pytest.param(None, each, id=f"{each.law}-{each.kind}") for each in dialect_findings(plugin)]

    @pytest.mark.parametrize(("law", "tried"), cases)
    def test_laws(law: Law | None, tried: Subject | Models | Finding) -> None:
        if isinstance(tried, Finding):
            finding = tried
        else:
            assert law is not None
            finding = examine(law, tried, examples=examples_of(law), seed=seed())
        if not finding.held:
            pytest.fail(str(finding), pytrace=False)

    return test_laws


def examples_of(law: Law) -> int:
    """How many cases the loaded hypothesis profile asks of a law."""
    return max(1, law.examples * settings().max_examples // USUAL)


def seed() -> int:
    """The seed of all cases: that of the environment, else 0."""
    return int(os.environ.get("COMPOSE_LAWS_SEED", "0"))
