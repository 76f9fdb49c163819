"""Codings: how an ecosystem says that weights are stored as codes, and what it calls what belongs to a code.

A dialect file with a `codec` in place of a `model_type` holds one coding. It goes with every dialect: architecture
and storage are told apart, in a config.json by its table `quantization_config`. A coding has

- `quant_method`: how that table names the method; `[config]`: its other keys, as lines of a dialect's `[config]`,
  where `ours` is a field of the precision policy, `precision.FIELD`; `plain`: keys that list modules which are
  stored without codes; `ignore`: keys that change no weight. Any other key is refused by name.
- `codec`: the kind of the codec that a plugin registers. `companions`: its further tensors in the codec's order, as
  `{ theirs = "{weight}_scale_inv", also = [...] }`, where `{weight}` is the name of the codes and `{module}` that
  name without its last step; `also` are dtypes beside the codec's own that can be read, but not kept.
- `[precision]`: the policy that computes with weights kept in this form.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import tomli

from composeformer.contracts import Weight
from composeformer.dialects import parsing, reading, writing
from composeformer.dialects.lines import UNSET, Key
from composeformer.dialects.parsing import Table
from composeformer.dialects.reading import Values
from composeformer.dialects.rules import Shape
from composeformer.errors import DialectError, show
from composeformer.plugins import current

if TYPE_CHECKING:
    from composeformer.formats import CodecConfig

TABLE = "quantization_config"
FORMAT = 1
_HEAD = re.compile(r"^codec\s*=", re.MULTILINE)


@attrs.frozen(kw_only=True)
class Companion:
    """A tensor beside the codes: its name by theirs, and dtypes that are read beside the codec's own."""

    theirs: str
    also: tuple[str, ...] = ()

    def name(self, codes: str) -> str:
        """What is called so beside these codes."""
        before, hole, after = self._cut
        return f"{before}{codes if hole == 'weight' else codes.rpartition('.')[0]}{after}"

    @cached_property
    def _cut(self) -> tuple[str, str, str]:
        before, _, rest = self.theirs.partition("{")
        hole, _, after = rest.partition("}")
        return before, hole, after


@attrs.frozen(kw_only=True)
class Coding:
    """One way to store weights as codes."""

    name: str
    quant_method: str
    codec: str
    companions: tuple[Companion, ...]
    precision: Mapping[str, Any]
    keys: tuple[Key, ...] = ()
    plain: tuple[str, ...] = ()
    ignore: frozenset[str] = frozenset()

    def read(self, table: Mapping[str, Any]) -> "Stated":
        """What a `quantization_config` says. Raises DialectError with all that is wrong in it."""
        problems: list[str] = []
        names = [name for key in self.keys for name in (key.theirs, *key.also)]
        known = {"quant_method", *names, *self.plain, *self.ignore}
        for name, found in table.items():
            if name not in known:
                refusal = f"{self.name} does not know this field, and it could change the weights"
                problems.append(f"{name} = {show(found)}: {refusal}{reading.hint(name, known)}")
        values = Values(names=dict.fromkeys(str(key.name) for key in self.keys))
        for key in self.keys:
            reading.take(key, table, {}, values, problems)
        modules: dict[str, None] = {}
        for name in self.plain:
            stated = table.get(name)
            if stated is not None and not _texts(stated):
                problems.append(f"{name} = {show(stated)}: must be a list of module names")
            else:
                modules |= dict.fromkeys(stated or ())
        if problems:
            raise DialectError(*(f"{TABLE}.{line}" for line in problems))
        filled = {
            path.partition(".")[2]: values.names[str(key.name)]
            for key in self.keys
            for path in key.ours
            if not table.keys().isdisjoint((key.theirs, *key.also)) and values.names[str(key.name)] is not None
        }
        return Stated(coding=self, precision={**self.precision, **filled}, plain=tuple(modules))

    def write(self, policy: Any, plain: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of a policy's config, with the modules that are stored plainly."""
        made: dict[str, Any] = {"quant_method": self.quant_method}
        for key in self.keys:
            if key.write == "never":
                continue
            field = key.ours[0].partition(".")[2] if key.ours else None
            value = getattr(policy, field, None) if field is not None else None
            if field is not None and value is None:
                continue
            found = writing.foreign(key, Values(names={str(key.name): value}))
            if found is not UNSET:
                made[key.theirs] = found
        if plain and self.plain:
            made[self.plain[0]] = list(plain)
        return dict(sorted(made.items()))

    def stored(self, name: str, shape: Shape) -> tuple[Weight, ...]:
        """What holds the weight that they call `name`, codes first. Raises PluginError without the codec."""
        codes, *others = codec(self.codec).stored(Weight(name=name, shape=shape))
        if len(others) != len(self.companions):
            told = f"{self.name} names {len(self.companions)} tensors beside the codes"
            raise DialectError(f"{told}, the codec {self.codec} stores {len(others)}")
        named = zip(self.companions, others, strict=True)
        return (codes, *(attrs.evolve(other, name=companion.name(name)) for companion, other in named))

    @cached_property
    def codes(self) -> str:
        """The dtype of the codes."""
        return str(codec(self.codec).stored(Weight(name="weight", shape=(1, 1)))[0].dtype)


@attrs.frozen(kw_only=True)
class Stated:
    """What a config says of how weights are stored: the coding, the policy's fields, the modules without codes."""

    coding: Coding
    precision: Mapping[str, Any]
    plain: tuple[str, ...]

    @property
    def meaning(self) -> tuple[str, Mapping[str, Any]]:
        """What two tables share that mean the same, but for the modules they list, which the tensors tell too."""
        return self.coding.name, self.precision

    def excepts(self, name: str) -> bool:
        """Whether a tensor's module is said to be stored plainly: a pattern that matches from the start, or a suffix,
        as transformers reads such lists.
        """
        module = name.rpartition(".")[0]
        return any(_within(pattern, module) for pattern in self.plain)


def _within(pattern: str, module: str) -> bool:
    if module == pattern or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}"):
        return True
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        return False


def codec(kind: str) -> "CodecConfig":
    """The config of a codec, with its defaults. Raises ComposeError where no plugin brings it."""
    config: Any = current().registry.get("codec", kind).config()
    return config  # type: ignore[no-any-return]


def is_coding(text: str) -> bool:
    """Whether a dialect file holds a coding."""
    return _HEAD.search(text) is not None


def parse(text: str, label: str) -> Coding:
    """A coding from its TOML text. Raises DialectError naming `label` and the place of what is wrong."""
    try:
        t = Table(tomli.loads(text), label)
    except tomli.TOMLDecodeError as error:
        raise DialectError(f"{label}: {error}") from None
    if t.take("format", required=True) != FORMAT:
        t.fail(f"format must be {FORMAT}")
    name, method = str(t.text("name", required=True)), str(t.text("quant_method", required=True))
    kind = str(t.text("codec", required=True))
    listed, precision, keys = t.take("companions"), t.take("precision", required=True), t.take("config")
    if listed is not UNSET and not isinstance(listed, list):
        t.fail("companions must be a list")
    if not isinstance(precision, dict) or not isinstance(precision.get("kind"), str):
        t.fail("precision must be a table with a kind")
    if keys is not UNSET and not isinstance(keys, dict):
        t.fail("config must be a table")
    companions = [
        _companion(each, f"{label}: companions.{i}") for i, each in enumerate([] if listed is UNSET else listed)
    ]
    heads = ("precision",)
    lines = [
        parsing.key(k, table, f"{label}: config.{k}", heads=heads)
        for k, table in ({} if keys is UNSET else keys).items()
    ]
    plain, ignore = t.texts("plain"), t.texts("ignore")
    t.done()
    return Coding(
        name=name,
        quant_method=method,
        codec=kind,
        companions=tuple(companions),
        precision=precision,
        # A line without a path is still told apart by its own name.
        keys=tuple(attrs.evolve(line, name=line.name or line.theirs) for line in lines),
        plain=plain,
        ignore=frozenset(ignore),
    )


def _companion(table: object, where: str) -> Companion:
    t = Table(table, where)
    theirs, also = str(t.text("theirs", required=True)), t.texts("also")
    t.done()
    if not re.fullmatch(r"[\w.-]*\{(weight|module)\}[\w.-]*", theirs) or theirs == "{weight}":
        t.fail(f"theirs = {show(theirs)}: must have {{weight}} or {{module}} in it, and differ from the codes' name")
    return Companion(theirs=theirs, also=also)


def _texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(each, str) for each in found)
