"""The search: the fewest changes that move the first differing component furthest, told in the order they act.

One change alone is tried first, since one mistake is the rule: what the specs say otherwise, then how tensors are
related. Then all of them together, for a second mistake hides behind the first; choices of fields where both specs
agree are added while they help, and every change that is not needed is taken away again, one by one and then in pairs
(an order of features and the field that says it may differ together and mean nothing). Without any of what is left
the models agree less far.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from composeformer.decoder import Model
from composeformer.store.bisecting.change import Change, relevant
from composeformer.store.bisecting.explanation import Explanation, Step, agreement
from composeformer.store.bisecting.meaning import choices, differences
from composeformer.store.bisecting.tensors import proposals
from composeformer.store.bisecting.trials import Bench, Trial
from composeformer.store.bisecting.ways import Tensors

# Pairs are many: they are taken away only from few changes.
MOST_IN_PAIRS = 10

Changes = tuple[Change, ...]


def explain(model: Model, against: Model, ids: Tensor, valid: Tensor, tolerance: float) -> Explanation:
    """Why the outputs of `model` differ from those of the trusted model, on these ids, (B, T), where `valid`."""
    bench = Bench(model, against, ids, valid, tolerance)
    base = bench.run(())
    if base.first is None:
        return _alike(bench, base, model, against)
    stated = relevant(differences(bench.data, bench.trusted, bench.registry), base.first.where)
    eps = max(torch.finfo(each.activations).eps for each in (model, against))
    tensors = Tensors(bench.values, bench.trusted_values, eps)
    related, unrelated = proposals(bench.spec(()), tensors)
    offered = [*stated, *relevant(related, base.first.where)]
    best, tried = _best(bench, offered)
    needed = _needed(bench, best)
    found = bench.run(needed)
    return Explanation(
        steps=tuple(_steps(bench, needed)),
        remaining=found.first,
        worst=found.worst,
        tried=tuple(_told(bench, change) for change in tried if change not in needed),
        unrelated=tuple(unrelated) if found.first is not None else (),
        borrowed=found.borrowed,
        note=_depth(bench),
        trials=bench.count,
    )


def _best(bench: Bench, offered: Sequence[Change]) -> tuple[Changes, list[Change]]:
    """Changes that together agree furthest, and all that were tried."""
    tried: list[Change] = []
    best: Changes = ()
    for change in offered:
        tried.append(change)
        if bench.run((change,)).full:
            return (change,), tried
        best = _further(bench, (change,), best)
    best = _further(bench, tuple(offered), best)
    while not (found := bench.run(best)).full:
        assert found.first is not None, "a variant that can not be made reaches less far than none"
        extra = [change for change in offered if change not in best]
        extra += _choices(bench, best, found.first.where)
        tried += [change for change in extra if change not in tried]
        longer = best
        for change in extra:
            longer = _further(bench, (*best, change), longer)
            if bench.run(longer).full:
                break
        if longer == best:
            break
        best = longer
    return best, tried


def _further(bench: Bench, changes: Changes, best: Changes) -> Changes:
    """The one that agrees further; the second where they are equal."""
    return changes if bench.run(changes).reach > bench.run(best).reach else best


def _choices(bench: Bench, changes: Changes, path: str) -> list[Change]:
    """Other choices of the fields of the component at `path`, of what is in it and right around it."""
    spec = bench.spec(changes)
    nodes = {node.path: node for node in spec.plan.nodes()}
    within = [node for where, node in nodes.items() if where == path or where.startswith(f"{path}.")]
    outer = path.rpartition(".")[0]
    within += [nodes[outer]] if outer in nodes else []
    if not within:  # the logits, which the head gives
        within = [nodes["head"]]
    return choices(bench.edited(changes), {(node.slot, node.part.kind) for node in within}, bench.registry)


def _needed(bench: Bench, changes: Changes) -> Changes:
    """The changes without those, and without those pairs, that the reach does not need."""
    reach = bench.run(changes).reach
    kept = changes
    for size in (1, 2):
        for dropped in combinations(kept, size):
            # Two fields of specs do not cancel; an order of tensors and a field that tells it do.
            if size == 2 and (len(kept) > MOST_IN_PAIRS or all(each.source == "spec" for each in dropped)):
                continue
            left = tuple(change for change in kept if change not in dropped)
            if len(left) == len(kept) - size and bench.run(left).reach >= reach:
                kept = left
    return kept


def _steps(bench: Bench, changes: Changes) -> Iterable[Step]:
    """The changes in the order in which they move the first difference; together those that only act together."""
    done: Changes = ()
    left = list(changes)
    while left:
        before = bench.run(done)
        if before.first is None:
            return
        ahead = [change for change in left if bench.run((*done, change)).reach > before.reach]
        chosen = ahead[:1]
        if not ahead:  # several act on one component: the fewest that do together
            chosen = list(left)
            for change in reversed(left):
                fewer = [each for each in chosen if each is not change]
                if fewer and bench.run((*done, *fewer)).reach > before.reach:
                    chosen = fewer
        yield Step(first=before.first, changes=tuple(chosen))
        done = (*done, *chosen)
        left = [change for change in left if change not in chosen]


def _told(bench: Bench, change: Change) -> str:
    reason = bench.run((change,)).reason if change.source != "choice" else ""
    return f"{change.name} = {change.there}{f' (not alone: {reason})' if reason else ''}"


def _depth(bench: Bench) -> str:
    ours, theirs = len(bench.data["layers"]), len(bench.trusted["layers"])
    return "" if ours == theirs else f"{ours} layers here, {theirs} in the trusted folder"


def _alike(bench: Bench, base: Trial, model: Model, against: Model) -> Explanation:
    """Where both compute the same in full precision: by other numbers on the way, or with other rounding."""
    agree = f"in {bench.dtype} the outputs {agreement(base.worst)}"
    if base.inner:
        first = base.inner[0]
        note = f"{first.where} differs ({first.told}), but what it is in does not: {agree}"
    else:
        here, there = (
            f"{each.spec.single('precision').kind} in {each.spec.formats.activations}"
            for each in (model, against)
        )
        note = f"{agree}; what differs is rounding: precision {here} here, {there} in the trusted folder"
    return Explanation(steps=(), remaining=None, worst=base.worst, tried=(), note=note, trials=bench.count)
