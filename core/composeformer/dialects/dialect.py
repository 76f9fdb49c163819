"""A dialect at work: their config to a spec and back, and their tensors to ours and back."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from composeformer import lazy
from composeformer.dialects import codings, document, family, reading, rules, spellings, writing
from composeformer.dialects.rules import Transfer
from composeformer.errors import DialectError, SpecError, one_of, show
from composeformer.plugins import current
from composeformer.spec import Spec
from composeformer.spec.fingerprint import meaning

if TYPE_CHECKING:
    from torch import Tensor

    from composeformer.dialects.transfer import Lookup, Weights

Shapes = Mapping[str, tuple[int, ...]]


class Dialect:
    """One family as an ecosystem names it, made from the text of its file; errors call the file `label`."""

    def __init__(self, text: str, label: str = "dialect") -> None:
        self.family = family.parse(text, label)
        self.name = self.family.name
        self.source = self.family.source
        self.model_type = self.family.model_type
        self.architectures = self.family.architectures

    def __repr__(self) -> str:
        return f"Dialect({self.name!r})"

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config, or a GGUF file's metadata, says that it is of this family."""
        key = "model_type" if self.source == "huggingface" else "general.architecture"
        gguf = "general.architecture" in config
        return config.get(key) == self.model_type and gguf == (self.source == "gguf")

    def to_spec(
        self,
        config: Mapping[str, Any],
        shapes: Shapes | None = None,
        get: "Callable[[str], Tensor] | None" = None,
    ) -> dict[str, Any]:
        """The spec document of a config. GGUF needs the `shapes` of the tensors beside it, and `get` for the
        one whose numbers say what no key does.

        Raises DialectError with every field that is unknown, missing, or has a value that is not allowed. How the
        weights are stored is no matter of the architecture: `stated` tells it.
        """
        numbers = None if get is None else (lambda name: get(name).tolist())
        problems: list[str] = []
        try:
            self.stated(config)
        except DialectError as error:
            problems += error.lines
        try:
            values = reading.read(self.family, self._known(config), shapes or {}, numbers)
        except DialectError as error:
            problems += error.lines
        if problems:
            raise DialectError(*problems)
        return document.document(reading.tree(self.family, values), current().registry)

    def stated(self, config: Mapping[str, Any]) -> codings.Stated | None:
        """How a config says that weights are stored as codes; None: plainly.

        Raises DialectError where no plugin knows of it.
        """
        found = config.get(codings.TABLE)
        return None if found is None or self._own_table else codings.find(found)

    @property
    def _own_table(self) -> bool:
        """Whether a line of the family reads the table that tells of codes."""
        return self.source != "huggingface" or any(key.theirs == codings.TABLE for key in self.family.keys)

    def to_config(self, spec: Spec) -> dict[str, Any]:
        """The config that means the same as a spec, class defaults spelled out.

        Raises DialectError with the reasons why there is none.
        """
        if self.source != "huggingface":
            raise DialectError(f"{self.name}: {self.source} is read, not written")
        values = writing.values(self.family, spec)
        written = spellings.unfold(writing.config(self.family, values))
        config = {"architectures": list(self.architectures[:1]), "model_type": self.model_type, **written}
        config |= codings.config(spec, lambda: rules.expand(self.family, spec, values))
        try:
            again = Spec.from_dict(self.to_spec(config))
        except (DialectError, SpecError) as error:
            raise DialectError(*(f"it can not be said: {line}" for line in error.lines)) from error
        if (difference := _difference(meaning(spec), meaning(again), "")) is not None:
            where, ours, theirs = difference
            raise DialectError(f"{where} is {_told(ours)}, but {self.name} can only say {_told(theirs)}")
        return config

    def rules(self, spec: Spec) -> list[Transfer]:
        """The tensor lines expanded for a spec, what its formats store beside codes included.

        Raises DialectError for a spec that is not of this family, and for codes that a line can not move.
        """
        return codings.extended(rules.expand(self.family, spec, writing.values(self.family, spec)), spec)

    def read(self, spec: Spec, source: "Weights") -> "Iterator[tuple[str, Tensor]]":
        """Our tensors by name, loaded lazily, in the layout of the spec and the dtype of the source.

        Raises DialectError, before the first tensor, with all that are missing, mis-shaped or unexpected;
        later where a copy of a shared tensor differs from it.
        """
        found: Iterator[tuple[str, Tensor]] = _transfer("read")(self.rules(spec), source, self.name)
        return found

    def lookup(self, spec: Spec, source: "Weights") -> "Lookup":
        """Our tensors by name, one at a time in any order, also by groups: `get(name, groups=(start, stop))`.

        Raises DialectError as `read` does, all of it at once.
        """
        found: Lookup = _transfer("lookup")(self.rules(spec), source, self.name)
        return found

    def write(self, spec: Spec, get: "Callable[[str], Tensor]") -> "Iterator[tuple[str, Tensor]]":
        """Their tensors by name, made lazily from ours; exactly what `read` took, bit by bit."""
        made: Iterator[tuple[str, Tensor]] = _transfer("write")(self.rules(spec), get)
        return made

    def _known(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config in one spelling, without the keys that chose this dialect."""
        rest = dict(config)
        if self.source == "gguf":
            del rest["general.architecture"]
            return {k: spellings.decimal(v) if isinstance(v, float) else v for k, v in rest.items()}
        rest.pop("model_type", None)
        if not self._own_table:
            rest.pop(codings.TABLE, None)
        stated = rest.pop("architectures", None) or list(self.architectures[:1])
        if not isinstance(stated, list) or any(each not in self.architectures for each in stated):
            allowed = one_of(self.architectures)
            raise DialectError(f"architectures = {show(stated)}: {self.name} reads {allowed}")
        return spellings.fold(rest)


def _transfer(name: str) -> Any:
    return lazy.load(f"composeformer.dialects.transfer:{name}")


def _told(found: object) -> str:
    if isinstance(found, dict) and "kind" in found:
        return f"a {found['kind']}"
    return "the default" if found is None else show(found)


def _difference(a: Any, b: Any, path: str) -> tuple[str, object, object] | None:
    """The first place where two meanings differ: its path and both values, None for one that has none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in (*a, *(k for k in b if k not in a)):
            step = path if key in ("fields", "ends") else f"{path}.{key}" if path else key
            if (found := _difference(a.get(key), b.get(key), step)) is not None:
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            if (found := _difference(left, right, f"{path}.{index}")) is not None:
                return found
        return None
    return None if a == b else (path, a, b)
