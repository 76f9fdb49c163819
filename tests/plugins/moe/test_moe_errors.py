"""What is impossible of experts and routers is refused in one line, where it is written, before anything is made."""

import io
import re
import subprocess
import sys
import tracemalloc
from contextlib import redirect_stderr, redirect_stdout
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.cli.check_command import command
from composeformer.costs import cost
from composeformer.errors import Problem, SpecError
from composeformer.spec import Spec

TEXTS = {
    name: (files("composeformer") / "specs" / f"{name}.toml").read_text("utf-8")
    for name in ("tiny-deepseek-v3", "tiny-moe")
}
V3, MOE = TEXTS.values()


def edited(text: str, *lines: str) -> str:
    """The spec with these `key = value` lines in place of its own, or beside `top_k` where it has none."""
    for line in lines:
        key = line.partition(" = ")[0]
        if re.search(rf"(?m)^{key} = ", text):
            text = re.sub(rf"(?m)^{key} = .*$", line, text)
        else:
            text = text.replace("\ntop_k = ", f"\n{line}\ntop_k = ")
    return text


def number(text: str, line: str) -> int:
    return text.splitlines().index(line) + 1


# The text, the lines changed, the line that is refused, and what is told of it.
WRONG = [
    (V3, ["top_k = 17"], "top_k = 17", "must be <= num_experts (16)"),
    (V3, ["num_experts = 3", "num_groups = 1"], "top_k = 4", "must be <= num_experts (3)"),
    (V3, ["num_groups = 3"], "num_groups = 3", "must divide num_experts (16)"),
    (V3, ["num_groups = 32"], "num_groups = 32", "must divide num_experts (16)"),
    (V3, ["num_experts = 18"], "num_groups = 4", "must divide num_experts (18)"),
    (V3, ["top_k_groups = 5"], "top_k_groups = 5", "must be <= num_groups (4)"),
    (V3, ["top_k = 9"], "top_k = 9", "must be <= 8, the experts in 2 of 4 groups"),
    (
        V3,
        ["num_groups = 16", "top_k_groups = 16"],
        "[ffn.experts.router]",
        "needs groups of two experts or more",
    ),
    (MOE, ["top_k = 9"], "top_k = 9", "must be <= num_experts (8)"),
    (MOE, ["num_groups = 3"], "num_groups = 3", "must divide num_experts (8)"),
    (MOE, ["num_groups = 4", "top_k = 3"], "top_k = 3", "must be <= 2, the experts in 1 of 4 groups"),
    (
        MOE,
        ["normalize = false", 'softmax = "after"'],
        "normalize = false",
        "a softmax after the choice is normalised",
    ),
    (MOE, ['softmax = "befor"'], 'softmax = "befor"', "did you mean 'before'?"),
    (MOE, ['group_score = "top3"'], 'group_score = "top3"', "must be one of max, top2; did you mean 'top2'?"),
    (MOE, ["top_k = 0"], "top_k = 0", "must be >= 1"),
    (MOE, ["num_experts = 0"], "num_experts = 0", "must be >= 1"),
    (MOE, ["num_experts = 2000000000000"], "num_experts = 2000000000000", "must be from -1099511627776 to"),
    (MOE, ["num_shared_experts = -1"], "num_shared_experts = -1", "must be >= 0"),
    (MOE, ["balance_alpha = -0.1"], "balance_alpha = -0.1", "must be >= 0"),
    (MOE, ["routed_scaling_factor = 0.0"], "routed_scaling_factor = 0.0", "must be > 0"),
    (MOE, ["bias_update_speed = 0.1"], "bias_update_speed = 0.1", "unknown key; allowed: top_k, normalize"),
    (MOE, ["top_q = 3"], "top_q = 3", "did you mean 'top_k'?"),
]


@pytest.mark.parametrize(("text", "lines", "refused", "told"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_impossible_is_refused_at_its_line(
    tmp_path: Path, text: str, lines: list[str], refused: str, told: str
) -> None:
    text, path = edited(text, *lines), tmp_path / "wrong.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(SpecError) as caught:
        Spec.from_toml(text, label=str(path))
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        assert command.main([str(path)], standalone_mode=False) == 2
    (line,) = errors.getvalue().splitlines()
    assert line == f"compose: {caught.value}"
    assert line.startswith(f"compose: {path}:{number(text, refused)}: ffn.experts")
    assert told in line


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ('router = "nobody"', 'ffn.experts.router = "nobody": no router has this name'),
        ('router = { use = "nobody" }', 'ffn.experts.router.use = "nobody": no router has this name'),
        ('router = "experts"', "('experts' is a ffn)"),
        ("router = 3", "ffn.experts.router = 3: must be the name of a router"),
        (
            'router = { kind = "softmx", top_k = 2 }',
            "allowed: softmax, sigmoid-bias; did you mean 'softmax'?",
        ),
        ("router = { top_k = 2 }", "needs `use` with a name or `kind`: softmax, sigmoid-bias"),
        ("shared_intermediate_size = 16", "there are no shared experts; give num_shared_experts"),
        ("", "is required: this spec has no router; add [router] with a kind: softmax, sigmoid-bias"),
    ],
)
def test_a_router_that_is_none_is_refused(where: str, told: str) -> None:
    head, _, rest = MOE.partition("[ffn.experts.router]")
    bare = head + where + "\n" + rest[rest.index("\n[[layers]]") :]
    text = MOE.replace("num_shared_experts = 0", where) if where.startswith("shared") else bare
    with pytest.raises(SpecError) as caught:
        Spec.from_toml(text)
    (line,) = caught.value.lines
    assert told in line


def test_every_mistake_of_a_file_is_told_at_once() -> None:
    text = edited(V3, "num_groups = 3", "depth = 0", "beta_fast = 0.5")
    with pytest.raises(SpecError) as caught:
        Spec.from_toml(text)
    fields = [problem.field for problem in caught.value.problems]
    assert fields == ["position.rope.beta_fast", "ffn.experts.router.num_groups", "predictor.depth"]


def test_it_is_refused_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(edited(MOE, "num_experts = 1000000000", "num_groups = 7"), "utf-8")
    code = (
        "import sys; from composeformer.cli.check_command import command; "
        f"print(command.main([{str(path)!r}], standalone_mode=False), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
    assert "ffn.experts.router.num_groups = 7: must divide num_experts (1000000000)" in done.stderr


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_thousand_million_experts_are_counted_not_made(text: str) -> None:
    few, many = Spec.from_toml(text), edited(text, "num_experts = 1000000000")
    tracemalloc.start()
    counts = cost(Spec.from_toml(many))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    moe = [layer["ffn"] for layer in few.plan.layers if layer["ffn"].part.kind == "moe"]
    each = 3 * few.model.hidden_size * moe[0].part.config.intermediate_size + few.model.hidden_size
    added = 1_000_000_000 - moe[0].part.config.num_experts
    assert counts.total - cost(few).total == len(moe) * added * each


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_a_router_is_accepted_when_every_token_can_be_routed_and_only_then(
    experts: int, top_k: int, groups: int, chosen: int, best: bool
) -> None:
    score = "max" if best else "top2"
    lines = [f"num_experts = {experts}", f"num_groups = {groups}", f"top_k_groups = {chosen}"]
    text = edited(MOE, *lines, f'group_score = "{score}"', f"top_k = {top_k}")
    possible = experts % groups == 0 and chosen <= groups and top_k <= chosen * (experts // groups)
    if groups > 1 and groups == experts and not best:
        possible = False
    problems: list[Problem] = []
    try:
        Spec.from_toml(text)
    except SpecError as error:
        problems = list(error.problems)
    assert bool(problems) != possible
    assert all(problem.field.startswith("ffn.experts.router.") for problem in problems)
