"""Every mutant is killed by a law, and every law kills the mutant that it names."""

import pytest
from museum_kit import Mutant, everything, kill

from composeformer.testing import Law, all_laws

MUSEUM = everything()


@pytest.mark.parametrize("found", MUSEUM.values(), ids=MUSEUM)
def test_a_mutant_is_killed_by_the_laws_alone(found: Mutant) -> None:
    finding = kill(found)
    assert finding is not None, f"{found.name} survives: {found.told}"
    naming = [law.id for law in all_laws() if law.kills == found.name]
    assert not naming or finding.law in naming, f"{naming} name it, and {finding.law} killed it"


@pytest.mark.parametrize("law", all_laws(), ids=str)
def test_a_law_names_a_mutant_of_its_slot(law: Law) -> None:
    assert law.kills in MUSEUM, f"{law} kills {law.kills!r}, which is not in the museum"
