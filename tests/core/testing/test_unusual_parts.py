"""No law refuses a part that is right and unusual. A profile of more cases, or another seed, tries them harder."""

from typing import Any

import pytest
import unusual_parts

from composeformer.testing import examine, laws_for, subject
from composeformer.testing.suite import examples_of, seed

# Of the cases of an ordinary run: the laws have to find a bug there, and here none.
SHARE, LEAST = 12, 2
REGISTRY = unusual_parts.registry()
TRIED = [
    pytest.param(law, component, id=f"{law.id}-{component.kind}")
    for component in unusual_parts.COMPONENTS
    for law in laws_for(component)
]


@pytest.mark.parametrize(("law", "component"), TRIED)
def test_a_law_holds_for_a_right_part_however_unusual(law: Any, component: Any) -> None:
    tried = subject(component.slot, component.kind, registry=REGISTRY)
    found = examine(law, tried, examples=max(LEAST, examples_of(law) // SHARE), seed=seed())
    assert found.held, str(found)
