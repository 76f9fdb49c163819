"""Trials: the model in question with changes applied, run beside the trusted one, in full precision.

Both models are taken to one wide dtype, with codes decoded, so that what a policy rounds is not taken for a
convention. A variant is built anew from its spec; it shares every tensor that no change touches, and its run ends at
the first component that differs, so a trial costs no copy and seldom a whole forward.
"""

from collections.abc import Callable, Container, Iterable
from typing import Any

import attrs
import torch
from torch import Tensor

from composeformer.assemble import coded, fill, in_dtype, skeleton
from composeformer.decoder import Model
from composeformer.errors import ComposeError, InputError
from composeformer.spec import Spec
from composeformer.spec.document import from_data
from composeformer.store.bisecting.change import Change, Steps
from composeformer.store.bisecting.meaning import Data, edited, written_out
from composeformer.store.decoding import decoder
from composeformer.store.outputs import Difference, difference, first_of, outputs
from composeformer.tensors import DTYPES


@attrs.frozen(kw_only=True)
class Trial:
    """How far a variant agrees: `reach` of the trusted model's outputs, in order, are alike; `first` is the next, and
    None where all are, `worst` then the largest difference of any. `inner` differ, but what they are in agrees: there
    features have another order, say, which is nobody's business. `borrowed` are tensors that the variant needs and
    only the trusted model has. A variant that can not be made has no reach at all, and a `reason`.
    """

    reach: int
    first: Difference | None
    worst: float | None
    inner: tuple[Difference, ...] = ()
    borrowed: tuple[str, ...] = ()
    reason: str = ""

    @property
    def full(self) -> bool:
        return self.first is None and not self.reason


class Bench:
    """The two models, wide; `run` tries changes of the first. `data` and `values` are the first's, `trusted` and
    `trusted_values` the second's.
    """

    def __init__(self, model: Model, against: Model, ids: Tensor, valid: Tensor, tolerance: float) -> None:
        self.dtype = "float64" if torch.float64 in (model.activations, against.activations) else "float32"
        self.device, self.registry = str(model.device), model.spec.registry
        self.ids, self.valid, self.tolerance = ids, valid, tolerance
        self.data, self.values = self._wide(model)
        self.trusted, self.trusted_values = self._wide(against)
        self.trusted_spec = self._spec(self.trusted)
        self._outputs = self._run(self.trusted_spec, self.trusted_values)
        self._tried: dict[frozenset[int], Trial] = {}

    def spec(self, changes: Iterable[Change]) -> Spec:
        """The model in question with changes, on paper. Raises ComposeError where there is no such model."""
        return self._spec(self.edited(changes))

    def edited(self, changes: Iterable[Change]) -> Data:
        """The spec of the model in question, written out, with changes."""
        edits: dict[Steps, Any] = {}
        for change in changes:
            edits |= dict(change.edits)
        return edited(self.data, edits)

    def run(self, changes: Iterable[Change]) -> Trial:
        """What comes of these changes together; each set of them is tried once."""
        chosen = tuple(changes)
        key = frozenset(id(change) for change in chosen)
        if key not in self._tried:
            self._tried[key] = self._trial(chosen)
        return self._tried[key]

    @property
    def count(self) -> int:
        """How many sets of changes were tried."""
        return len(self._tried)

    def _trial(self, changes: tuple[Change, ...]) -> Trial:
        try:
            spec = self.spec(changes)
            # Without changes all is run, so that what differs first is what a comparison says.
            values, borrowed = self._chosen(spec, changes)
            found = self._run(spec, values, self._differs if changes else None)
        except ComposeError as error:
            return Trial(reach=-1, first=None, worst=None, reason=error.lines[0])
        apart = tuple(
            difference(path, found.get(path), output, self.valid) for path, output in self._outputs.items()
        )
        agree = {each.where for each in apart if not each.beyond(self.tolerance)}
        inner = tuple(each for each in apart if each.where not in agree and _within(each.where, agree))
        first = first_of(tuple(each for each in apart if each not in inner), self.tolerance)
        if first is None:
            worst = max(each.relative or 0.0 for each in apart if each not in inner)
            return Trial(reach=len(apart), first=None, worst=worst, inner=inner, borrowed=borrowed)
        reach = apart.index(first)
        if changes and first.where not in found and first.where in {node.path for node in spec.plan.nodes()}:
            # It was not reached: a variant that computes in another order ended further on.
            last = next(reversed(found))
            first = next(each for each in apart if each.where == last)
        return Trial(reach=reach, first=first, worst=None, inner=inner, borrowed=borrowed)

    def _differs(self, path: str, output: Tensor) -> bool:
        """Whether this output is in no other and not the trusted one: what follows it can not tell more."""
        trusted = self._outputs.get(path)
        if trusted is None or _within(path, self._outputs):
            return False
        return difference(path, output, trusted, self.valid).beyond(self.tolerance)

    def _chosen(self, spec: Spec, changes: tuple[Change, ...]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """The variant's tensors: changed, else our own, else the trusted ones, where a change asks for more; and the
        names of these.
        """
        changed: dict[str, Tensor] = {}
        for change in changes:
            changed |= change.tensors
        found: dict[str, Tensor] = {}
        borrowed = []
        for name, weight in spec.plan.tensors.items():
            for source in (changed, self.values, self.trusted_values):
                if name in source and tuple(source[name].shape) == weight.shape:
                    found[name] = source[name]
                    if source is self.trusted_values:
                        borrowed.append(name)
                    break
            else:
                raise InputError(f"{name} {weight.shape}: neither folder has such a tensor")
        return found, tuple(borrowed)

    def _run(
        self,
        spec: Spec,
        values: dict[str, Tensor],
        enough: Callable[[str, Tensor], bool] | None = None,
    ) -> dict[str, Tensor]:
        model = skeleton(spec, device=self.device)
        fill(model, coded(model.spec, values.items()), self.device)
        return outputs(model, self.ids, self.valid, enough)

    def _spec(self, data: Data) -> Spec:
        return Spec(from_data(data, "the model with a change"), self.registry)

    def _wide(self, model: Model) -> tuple[Data, dict[str, Tensor]]:
        """A model's spec, written out, and its tensors, in the wide dtype where the default policy has it."""
        data = written_out(model.spec)
        try:
            wide = in_dtype(model.spec, self.dtype).to_dict()
        except InputError:
            wide = {}  # no policy of one dtype is installed: both run as they are
        if "precision" in wide:
            data["precision"] = wide["precision"]
        return data, numbers(model, DTYPES[self.dtype], self.device)


def _within(path: str, paths: Container[str]) -> bool:
    """Whether a component is in one of these."""
    steps = path.split(".")
    return any(".".join(steps[:count]) in paths for count in range(1, len(steps)))


def numbers(model: Model, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Every tensor that the plan names, codes decoded, on `device`, in `dtype` but where its part fixes another."""
    state, spec = model.state_dict(), model.spec
    found = {}
    for name, weight in spec.plan.tensors.items():
        parts = spec.formats.coded.get(name)
        if parts is not None:
            codec = str(spec.formats.tensors[name].codec)
            found[name] = decoder(codec).decode([state[part] for part in parts], dtype).to(device)
        else:
            wide = state[name].is_floating_point() and weight.dtype is None
            found[name] = state[name].to(device, dtype if wide else None)
    return found
