"""Looking up components: what is there, what is contested, and what an error says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.config import Config, config
from composeformer.contracts import Component, Implementation
from composeformer.errors import PluginError, SpecError
from composeformer.plugins import Plugins
from composeformer.registry import Contested, PluginInfo, Registry, UnknownKind


@config
class Nothing(Config):
    pass


def component(slot, kind, default=False, revision=1):
    reference = (Implementation("reference", "never.imported:Module"),)
    return Component(slot, kind, Nothing, reference, default=default, revision=revision)


def info(name, *components, status="loaded", cause=None, version="1.0"):
    return PluginInfo(
        name=name, distribution=f"{name}-dist", version=version, origin=name, status=status, cause=cause,
        components=components,
    )  # fmt: skip


parts = st.builds(
    component, st.sampled_from(["norm", "ffn"]), st.sampled_from("abcd"), st.booleans(), st.integers(1, 3)
)
unique_parts = st.lists(parts, max_size=4, unique_by=lambda part: (part.slot, part.kind))
plugins = st.lists(unique_parts, max_size=4).map(
    lambda lists: [info(f"p{number}", *items) for number, items in enumerate(lists)]
)


@given(plugins)
def test_a_kind_can_be_had_exactly_when_one_plugin_has_it(infos):
    registry = Registry(infos)
    for slot in ("norm", "ffn"):
        for kind in "abcd":
            owners = [
                i.name for i in infos for part in i.components if (part.slot, part.kind) == (slot, kind)
            ]
            assert (kind in registry.kinds(slot)) == (len(owners) == 1)
            if not owners:
                with pytest.raises(UnknownKind):
                    registry.get(slot, kind)
            elif len(owners) == 1:
                found = registry.get(slot, kind)
                assert (found.slot, found.kind) == (slot, kind)
                assert registry.owner(found).name == owners[0]
                assert found in list(registry)
            else:
                with pytest.raises(Contested) as raised:
                    registry.get(slot, kind)
                for name in owners:
                    assert f"{name} ({name}-dist 1.0)" in str(raised.value)
                    assert f"--no-plugin {name}" in str(raised.value)
    assert len(registry) == len(list(registry)) == len(registry.kinds("norm")) + len(registry.kinds("ffn"))


@given(plugins)
def test_a_default_can_be_had_exactly_when_there_is_one(infos):
    registry = Registry(infos)
    for slot in ("norm", "ffn"):
        defaults = [part for i in infos for part in i.components if part.slot == slot and part.default]
        kind_count = sum(part.kind == d.kind and part.slot == slot for i in infos for part in i.components
                         for d in defaults[:1])  # fmt: skip
        if not defaults:
            assert registry.default(slot) is None
        elif len(defaults) == 1 and kind_count == 1:
            assert registry.default(slot) is defaults[0]
        else:
            with pytest.raises(Contested, match=f"{slot}.*choose with --no-plugin"):
                registry.default(slot)


@given(plugins)
def test_every_owner_of_a_conflict_mentions_it(infos):
    registry = Registry(infos)
    for seen in registry.infos:
        expected = tuple(str(c) for c in registry.contests if seen.name in [owner.name for owner in c.owners])
        assert seen.conflicts == expected
        for part in seen.components:
            assert (part.kind in registry.kinds(part.slot)) == (
                not any((c.slot, c.kind) == (part.slot, part.kind) for c in registry.contests)
            )


@given(plugins, st.randoms())
def test_the_digest_ignores_order(infos, random):
    mixed = [*infos]
    random.shuffle(mixed)
    assert Plugins(mixed).digest() == Plugins(infos).digest()


@given(
    st.lists(
        st.tuples(parts, st.sampled_from(["x", "y"]), st.sampled_from(["1.0", "2.0", None])), max_size=3
    ),
    st.lists(
        st.tuples(parts, st.sampled_from(["x", "y"]), st.sampled_from(["1.0", "2.0", None])), max_size=3
    ),
)
def test_the_digest_tells_slot_kind_revision_distribution_and_version(left, right):
    def loaded(rows):
        return Plugins(info(name, part, version=version) for part, name, version in rows)

    def facts(rows):
        return sorted((p.slot, p.kind, p.revision, name, version or "") for p, name, version in rows)

    assert (loaded(left).digest() == loaded(right).digest()) == (facts(left) == facts(right))


def test_an_unknown_kind_tells_the_kinds_and_the_nearest():
    registry = Registry(
        [info("dense", component("ffn", "swiglu"), component("ffn", "moe"), component("norm", "rms"))]
    )
    with pytest.raises(UnknownKind) as raised:
        registry.get("ffn", "swigul")
    error = raised.value
    assert (error.slot, error.kind, error.kinds, error.nearest) == (
        "ffn",
        "swigul",
        ("swiglu", "moe"),
        "swiglu",
    )
    assert (
        str(error) == "ffn.kind = \"swigul\": unknown ffn kind; allowed: swiglu, moe; did you mean 'swiglu'?"
    )
    problem = error.problem().under("ffn.dense")
    assert str(SpecError([problem])).startswith('ffn.dense.kind = "swigul": unknown ffn kind')


def test_an_unknown_kind_mentions_plugins_that_may_own_it():
    failed = info("fast", status="failed", cause="its import raised ImportError")
    blocked = info("slow", status="blocked")
    with pytest.raises(UnknownKind) as raised:
        Registry([info("dense", component("ffn", "a")), failed, blocked]).get("ffn", "mine")
    assert "plugin that failed to load: fast (fast-dist 1.0)" in str(raised.value)
    assert "plugin that is blocked: slow (slow-dist 1.0)" in str(raised.value)


def test_an_unknown_slot_is_told():
    with pytest.raises(UnknownKind, match="'fnf' is no slot; slots: embedding, head, mixer, ffn"):
        Registry([info("dense", component("ffn", "a"))]).get("fnf", "a")


def test_an_empty_registry_says_that_there_is_nothing():
    with pytest.raises(UnknownKind, match="allowed: none"):
        Registry().get("ffn", "a")
    assert Registry().default("ffn") is None


def test_a_contested_kind_says_how_to_choose_and_leaves_the_rest():
    registry = Registry(
        [info("one", component("ffn", "a"), component("ffn", "b")), info("two", component("ffn", "a"))]
    )
    with pytest.raises(PluginError) as raised:
        registry.get("ffn", "a")
    assert str(raised.value) == (
        'ffn.kind = "a": registered by plugins one (one-dist 1.0) and two (two-dist 1.0); '
        "choose with --no-plugin one or --no-plugin two, or by a list of plugins in COMPOSE_PLUGINS"
    )
    assert registry.get("ffn", "b").kind == "b"
    with pytest.raises(UnknownKind, match="allowed: b; contested: a"):
        registry.get("ffn", "c")


def test_a_stranger_has_no_owner():
    with pytest.raises(KeyError, match="not of this registry"):
        Registry().owner(component("ffn", "a"))
