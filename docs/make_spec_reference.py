"""Writes docs/spec.md: the spec language, then every table and component of the built-in plugins, from their configs.

Run it from the repository's root after a config changes; a test fails while the page and the configs disagree.
"""

from pathlib import Path

from composeformer.config import Config, describe, facts_of
from composeformer.contracts import SINGLE, SLOTS, Component
from composeformer.cost_config import CostConfig
from composeformer.errors import show
from composeformer.model_config import ModelConfig, ParallelConfig, TrainConfig
from composeformer.plugins import current

PAGE = Path(__file__).with_name("spec.md")
LANGUAGE = Path(__file__).with_name("spec_language.md")


def page() -> str:
    """The whole page."""
    parts = [LANGUAGE.read_text(encoding="utf-8").rstrip(), "## Tables of the core"]
    parts += [f"### `[model]`\n\n{table(ModelConfig)}", f"### `[train]`\n\n{table(TrainConfig)}"]
    parts.append(f"### `[parallel]`\n\n{table(ParallelConfig)}")
    parts.append(f"### `[cost]`\n\n{table(CostConfig)}")
    registry = current().registry
    for slot, meaning in SLOTS.items():
        components = [registry.get(slot, kind) for kind in sorted(registry.kinds(slot))]
        if not components:
            continue
        named = f"`[{slot}]`" if slot in SINGLE else f"`[{slot}]` or `[{slot}.NAME]`"
        parts.append(f"## {slot}: {meaning}\n\nWritten {named}.")
        parts += [section(component) for component in components]
    return "\n\n".join(parts) + "\n"


def section(component: Component) -> str:
    """One component: what it is, who brings it, its implementations and fields."""
    owner = current().registry.owner(component)
    names = ", ".join(f"`{i.name}`" for i in component.implementations)
    default = " The default of its slot." if component.default else ""
    summary = component.summary[:1].upper() + component.summary[1:]
    head = f'### `kind = "{component.kind}"`\n\n{summary}; plugin `{owner.name}`, '
    return f"{head}implementations {names}.{default}\n\n{table(component.config)}"


def table(config: type[Config]) -> str:
    """The fields of a config as a Markdown table."""
    facts = facts_of(config)
    if not facts:
        return "No fields."
    rows = ["| field | allowed | default | affects | meaning |", "|---|---|---|---|---|"]
    for fact in facts.values():
        default = (
            "the only one of its slot"
            if fact.slot and fact.required
            else "required"
            if fact.required
            else show(fact.default)
        )
        default = "absent" if default == "None" else default
        allowed = describe(fact).replace("|", "\\|")
        rows.append(f"| `{fact.name}` | {allowed} | {default} | {fact.affects} | {fact.help} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
