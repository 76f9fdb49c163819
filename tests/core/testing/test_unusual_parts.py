"""No law refuses a part that is right and unusual. A profile of more cases, or another seed, tries them harder."""

from typing import Any

import pytest
import unusual_parts

from composeformer.testing import examine, laws_for, subject
from composeformer.testing.suite import examples_of, seed

# Of the cases of an ordinary run: the laws have to find a bug there, and here none.
SHARE, LEAST = 24, 2
# Laws that refused a part before they were mended have all of them.
WHOLE = {
    ("everywhere.flops", "rezero"),  # beside a router that chooses nobody
    ("everywhere.reference", "product-keys"),  # whose choice a rounding turns
    ("mixer.history", "signed"),  # of a document whose sums cancel
    ("optimizer.learning-rate", "lion"),  # whose steps take each other back
    ("residual.calls-each-once", "rezero"),  # in specs that are refused
}
REGISTRY = unusual_parts.registry()
TRIED = [
    pytest.param(law, component, id=f"{law.id}-{component.kind}")
    for component in unusual_parts.COMPONENTS
    for law in laws_for(component)
]


@pytest.mark.parametrize(("law", "component"), TRIED)
def test_a_law_holds_for_a_right_part_however_unusual(law: Any, component: Any) -> None:
    tried = subject(component.slot, component.kind, registry=REGISTRY)
    share = 1 if (law.id, component.kind) in WHOLE else SHARE
    found = examine(law, tried, examples=max(LEAST, examples_of(law) // share), seed=seed())
    assert found.held, str(found)
