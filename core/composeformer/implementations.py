"""Which implementation computes a part in each phase, and one module that serves all of them.

A spec may ask for an implementation by name; `auto` takes the first that gives no reason against it. All
implementations of a component share one state, so where phases differ the module that holds it is of the
class that trains, and the others are views of it.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from composeformer.contracts import PHASES, Facts, Implementation, Part, Phase
from composeformer.errors import Problem, SpecError, one_of
from composeformer.site import Site
from composeformer.spec.resolve import place
from composeformer.spec.scanner import dotted

log = logging.getLogger(__name__)

# Parts of these slots are called with a batch, which says the phase; the others never learn it.
PHASED = ("mixer", "ffn", "router", "residual", "predictor")


ALONE = "it is only for "


class Chooser:
    """Chooses for one model, on a `device` type and with activations of a `dtype`."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device = device
        self.dtype = dtype
        self._logged: set[tuple[object, ...]] = set()

    def choose(self, stated: Part, config: Any, site: Site) -> dict[Phase, Implementation]:
        """The implementation of a part in each phase; `config` has the site's defaults filled in.

        Raises SpecError where the one asked for can not serve, or none can.
        """
        if stated.slot in PHASED:
            return {p: self._one(stated, config, site, (p,), stated.chosen(p)) for p in PHASES}
        asked = {name for phase in PHASES if (name := stated.chosen(phase)) != "auto"}
        if len(asked) > 1:
            told = f"a {stated.slot} is not told the phase; choose one implementation for all"
            raise _wrong(stated, site, " and ".join(sorted(asked)), told)
        wanted = asked.pop() if asked else "auto"
        return dict.fromkeys(PHASES, self._one(stated, config, site, PHASES, wanted))

    def _one(
        self, stated: Part, config: Any, site: Site, phases: tuple[Phase, ...], wanted: str
    ) -> Implementation:
        refused: list[tuple[str, str]] = []
        for offered in stated.component.implementations:
            if wanted not in ("auto", offered.name):
                continue
            reason = self._reason(offered, config, site, phases)
            if reason is not None:
                refused.append((offered.name, reason))
                continue
            for name, why in refused:
                # One that is made for other phases was never a candidate for these.
                if not why.startswith(ALONE):
                    self._log(stated, site, phases, name, offered.name, why)
            return offered
        if wanted != "auto":
            raise _wrong(stated, site, wanted, f"can not serve {one_of(phases)} here: {refused[0][1]}")
        reasons = "; ".join(f"{name}: {why}" for name, why in refused)
        raise _wrong(stated, site, stated.kind, f"nothing serves {one_of(phases)} here: {reasons}", "kind")

    def _reason(
        self, offered: Implementation, config: Any, site: Site, phases: tuple[Phase, ...]
    ) -> str | None:
        for phase in phases:
            if phase not in offered.phases:
                return f"{ALONE}{one_of(offered.phases)}"
            facts = Facts(config=config, site=site, phase=phase, device=self.device, dtype=self.dtype)
            reason = None if offered.needs is None else offered.needs(facts)
            if reason is not None:
                return reason
        return None

    def _log(
        self, stated: Part, site: Site, phases: tuple[Phase, ...], refused: str, chosen: str, why: str
    ) -> None:
        # Layers are alike; one line says it for all.
        key = (stated.slot, stated.kind, phases, refused, chosen, why)
        if key not in self._logged:
            self._logged.add(key)
            when = f"{site.path}: {stated.slot} {stated.kind} in {one_of(phases)}"
            log.info("%s falls back from %s to %s: %s", when, refused, chosen, why)


def serve(owner: nn.Module, classes: Mapping[Phase, type[nn.Module]]) -> None:
    """Makes `owner`, an instance of one of `classes`, compute each phase by that phase's class."""
    if any(cls is not type(owner) for cls in classes.values()):
        owner.__dict__["forward"] = Dispatch(owner, classes)


class Dispatch:
    """A module's forward where phases are served by different classes over one state."""

    def __init__(self, owner: nn.Module, classes: Mapping[Phase, type[nn.Module]]) -> None:
        self._owner = owner
        self._classes = classes
        self._views: dict[Phase, nn.Module] = {phase: _view(owner, cls) for phase, cls in classes.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        phase = next(a.phase for a in (*args, *kwargs.values()) if hasattr(a, "phase"))
        return self._classes[phase].forward(self._views[phase], *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Dispatch":
        # The owner's copy is known before its attributes are copied; views must share its state, not the old.
        return Dispatch(memo.get(id(self._owner), self._owner), self._classes)


def _view(owner: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """The same state under another class."""
    if cls is type(owner):
        return owner
    view = object.__new__(cls)
    view.__dict__ = owner.__dict__
    return view


def _wrong(stated: Part, site: Site, found: str, told: str, field: str = "implementation") -> SpecError:
    document = site.spec.document
    path = place(document, stated.paths, field)
    if site.path != dotted(stated.paths[0]):
        told = f"{told} ({site.path})"
    return SpecError([Problem(dotted(path), found, told, None, document.source(path))])
