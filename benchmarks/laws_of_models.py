"""Every law of whole models on every one of many drawn specs: a long look for what the tests' few cases do not meet.

A spec over all slots and plugins is drawn and built once, and all laws are tried on it. What is drawn depends on seeds
alone, each of which makes `CHUNK` specs: ranges of seeds can be run apart, in several processes, and joined.

    python benchmarks/laws_of_models.py [--specs N] [--seed S]    goes on with benchmarks/results/laws_of_models.json
    python benchmarks/laws_of_models.py --join FILE FILE...       writes it from the results of several ranges
"""

import argparse
import json
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import composeformer as cf
from composeformer.testing.certificate import Finding, poisoned
from composeformer.testing.drawing import Drawn
from composeformer.testing.law import Law, LawBroken, model_laws
from composeformer.testing.models import ModelCase, Models, models
from composeformer.testing.steady import steady

RESULT = Path(__file__).parent / "results" / "laws_of_models.json"
CHUNK = 25
# Two processes are forked for the one; the other draws models of its own, which it writes to disk three times.
SELDOM = {"model.processes": 10, "model.exported": 10}


class Rejected(Exception):
    """A case that says nothing."""


class Shared(Drawn):
    """Draws for one law of many on one spec: what a law drew of the spec itself is there for the next."""

    def __init__(self, data: "st.DataObject", kept: dict[str, Any]) -> None:
        super().__init__(data)
        self._kept = kept

    def __call__(self, label: str, strategy: "st.SearchStrategy[Any]") -> Any:
        if label not in self._kept:
            return super().__call__(label, strategy)
        self.values[label] = self._kept[label]
        return self.values[label]

    def reject(self, why: str) -> NoReturn:
        raise Rejected(why)


class Run:
    """What was found so far, as it is written."""

    def __init__(self, found: dict[str, Any] | None = None) -> None:
        self.found: dict[str, Any] = found or {
            "specs": 0,
            "cases": 0,
            "seconds": 0.0,
            "seeds": [],
            "failures": [],
            "laws": {},
            "parts": {},
            "implementations": {},
            "layers": {},
            "rejected": {},
        }

    def count(self, what: str, name: str, by: int = 1) -> None:
        self.found[what][name] = self.found[what].get(name, 0) + by

    def law(self, law: Law, case: ModelCase | None, seconds: float) -> None:
        told = self.found["laws"].setdefault(
            law.id, {"cases": 0, "rejected": 0, "worst_error": 0.0, "its_bound": 0.0, "seconds": 0.0}
        )
        told["seconds"] = round(told["seconds"] + seconds, 4)
        if case is None:
            told["rejected"] += 1
            return
        told["cases"] += 1
        self.found["cases"] += 1
        if case.error * told["its_bound"] >= told["worst_error"] * case.bound:
            told["worst_error"], told["its_bound"] = case.error, case.bound

    def add(self, other: dict[str, Any]) -> None:
        """Joins another range's results."""
        mine = self.found
        for what in ("specs", "cases"):
            mine[what] += other[what]
        mine["seconds"] = round(mine["seconds"] + other["seconds"], 1)
        for what in ("seeds", "failures"):
            mine[what] += [each for each in other[what] if what == "failures" or each not in mine[what]]
        for what in ("parts", "implementations", "layers", "rejected"):
            for name, number in other[what].items():
                self.count(what, name, number)
        for name, told in other["laws"].items():
            if name in mine["laws"]:
                _join(mine["laws"][name], told)
            else:
                mine["laws"][name] = dict(told)

    def write(self, path: Path) -> None:
        found = {
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hypothesis": hypothesis.__version__,
            "composeformer": cf.__version__,
            **self.found,
        }
        for what in ("parts", "implementations", "layers", "rejected"):
            found[what] = dict(sorted(found[what].items()))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _join(own: dict[str, Any], told: dict[str, Any]) -> None:
    for what in ("cases", "rejected", "seconds"):
        own[what] = round(own[what] + told[what], 4)
    if told["worst_error"] * own["its_bound"] >= own["worst_error"] * told["its_bound"]:
        own["worst_error"], own["its_bound"] = told["worst_error"], told["its_bound"]


def broken(
    law: Law, whole: Models, values: dict[str, Any], error: BaseException, seed: int
) -> dict[str, Any]:
    """A failure, with a test that shows it."""
    why = str(error) if isinstance(error, LawBroken) else f"raised {type(error).__name__}: {error}"
    finding = Finding.of(
        law,
        whole,
        verdict="broken",
        cases=1,
        error=0.0,
        bound=0.0,
        seed=seed,
        seconds=0.0,
        why=" ".join(why.split())[:400],
        values=values,
    )
    return {"law": law.id, "seed": seed, "why": finding.why, "counterexample": finding.counterexample()}


def look(data: "st.DataObject", whole: Models, laws: Sequence[Law], run: Run, seed: int) -> None:
    """Draws a spec and tries all laws on it."""
    first = ModelCase(whole, Shared(data, {}))
    try:
        batch = first.batch
        model = first.model
    except Rejected as error:
        run.count("rejected", _short(str(error)))
        return
    kept = dict(first.draw.values)
    run.found["specs"] += 1
    run.count("layers", str(len(first.spec.layers)))
    for node in first.spec.plan.nodes():
        run.count("parts", f"{node.slot} {node.part.kind}")
    for slot, part in first.spec.singles.items():
        if part is not None and slot in ("comm", "objective", "optimizer"):
            run.count("parts", f"{slot} {part.kind}")
    for path, ways in model.choices.items():
        part = next(node.part for node in first.spec.plan.nodes() if node.path == path)
        for phase, name in ways.items():
            run.count("implementations", f"{part.slot} {part.kind}: {name} in {phase}")
    if batch.documents is not None:
        run.count("layers", "with packed rows")
    if batch.valid is not None:
        run.count("layers", "with padding")
    for law in laws:
        if data.draw(st.integers(1, SELDOM.get(law.id, 1))) > 1:
            continue
        case = first.again(Shared(data, kept))
        begun = perf_counter()
        try:
            law.run(case)
        except Rejected as error:
            run.law(law, None, perf_counter() - begun)
            run.count("rejected", _short(f"{law.id}: {error}"))
            continue
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            failure = broken(law, whole, {**kept, **case.draw.values}, error, seed)
            run.found["failures"].append(failure)
            print(f"BROKEN {failure['why']}\n{failure['counterexample']}", flush=True)
        run.law(law, case, perf_counter() - begun)
        for label, value in case.draw.values.items():
            if label.startswith("implementation of "):
                for phase, name in value.items() if isinstance(value, dict) else [("", value)]:
                    told = label.removeprefix("implementation of ")
                    run.count("implementations", f"{told}: {name}{' in ' if phase else ''}{phase}")


def _short(why: str) -> str:
    """A reason without its numbers."""
    return " ".join("…" if any(c.isdigit() for c in word) else word for word in why.split())[:90]


def chunk(seed: int, whole: Models, laws: Sequence[Law], run: Run) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=CHUNK,
        phases=(Phase.generate,),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.data())
    def specs(data: "st.DataObject") -> None:
        look(data, whole, laws, run, seed)

    begun = perf_counter()
    with poisoned(), steady():
        specs()
    run.found["seconds"] = round(run.found["seconds"] + perf_counter() - begun, 1)
    run.found["seeds"].append(seed)


def main() -> int:
    reader = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    reader.add_argument("--specs", type=int, default=2000, help="How many to look at in all.")
    reader.add_argument("--seed", type=int, default=0, help="The first seed.")
    reader.add_argument("--law", help="This law alone, as model.name.")
    reader.add_argument("--output", type=Path, default=RESULT)
    reader.add_argument("--join", type=Path, nargs="+", help="Results of several ranges of seeds.")
    asked = reader.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if asked.join:
        run = Run()
        for path in asked.join:
            run.add(json.loads(path.read_text("utf-8")))
        run.write(asked.output)
        return 1 if run.found["failures"] else 0
    there = json.loads(asked.output.read_text("utf-8")) if asked.output.exists() else None
    run = Run(None if there is None else {key: there[key] for key in Run().found})
    (whole,) = models()
    laws = [law for law in model_laws() if asked.law in (None, law.id)]
    seed = asked.seed
    while run.found["specs"] < asked.specs:
        if seed not in run.found["seeds"]:
            chunk(seed, whole, laws, run)
            run.write(asked.output)
            specs, seconds, failures = (run.found[name] for name in ("specs", "seconds", "failures"))
            print(
                f"{specs} specs, {run.found['cases']} cases, {seconds:.0f} s, {len(failures)} failures",
                flush=True,
            )
        seed += 1
    return 1 if run.found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
