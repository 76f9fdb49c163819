"""Writes docs/laws.md: the guide, then every law by slot.

Run it from the repository's root after a law changes; a test fails while the page and the laws disagree.
"""

from pathlib import Path

from composeformer.contracts import SLOTS
from composeformer.testing.law import EVERYWHERE, MODEL, all_laws

PAGE = Path(__file__).with_name("laws.md")
GUIDE = Path(__file__).with_name("laws_guide.md")
TITLES = {EVERYWHERE: "every slot", MODEL: "whole models"} | {slot: slot for slot in SLOTS}


def page() -> str:
    """The whole page."""
    parts = [GUIDE.read_text(encoding="utf-8").rstrip()]
    laws = all_laws()
    for slot, title in TITLES.items():
        own = [law for law in laws if law.slot == slot]
        if own:
            rows = ["| law | what must hold | | kills, for one |", "|---|---|---|---|"]
            for law in own:
                claimed = "claimed" if law.claimed else ""
                rows.append(f"| `{law.id}` | {law.told} | {claimed} | {law.kills} |")
            parts.append(f"## Laws of {title}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
