"""Laws of precision policies: the matrix that a map multiplies by, what a map holds and gives, and formats on paper.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from functools import partial
from math import prod
from typing import Any

import attrs
import torch
from torch import Tensor

from composeformer.contracts import Weight
from composeformer.formats import BITS, Format
from composeformer.policy import PolicyLinear
from composeformer.rounding import FLOATS, Rounding
from composeformer.tensors import DTYPES
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.maps import ROLE, Bounded, Maps, near, serves_cpus

of_maps = partial(law, "precision", applies=serves_cpus)
FLOATING = ("float32", "bfloat16", "float64")


@of_maps(
    "matrix",
    "`matrix` is the weight that `forward` multiplies by: unit rows give its columns",
    kills="matrix-is-the-master",
)
def matrix(case: Case) -> None:
    maps = Maps(case, bias=False, dtype="float32", rows=(1,))
    power = 2.0 ** case.integer("exponent", -4, 4)
    inputs, groups = maps.declared.inputs, maps.groups or 1
    linear = maps.linear()
    x = (power * torch.eye(inputs)).repeat(groups, 1)
    ends = None if maps.groups is None else [inputs * (n + 1) for n in range(groups)]
    with torch.no_grad():
        used = linear(x, *maps.offsets(ends)).view(*maps.declared.weight.shape[:-2], inputs, -1).mT
        m = linear.matrix()
    case.require(m.is_floating_point(), f"the matrix is of {m.dtype}")
    exact = m.double() * power
    # A row's own code and scale are exact but for their product's two roundings; a result in the matrix's dtype is it.
    unit = 4 * 2.0**-24 + (maps.rounding.result if torch.finfo(m.dtype).eps < maps.rounding.result else 0.0)
    near(
        case,
        used,
        Bounded(exact=exact, bound=unit * exact.abs() + torch.finfo(m.dtype).tiny),
        "the matrix used",
    )


@of_maps(
    "numbers",
    "elements that share a scale are of as few values as the declared bits allow; without one they are of the dtype",
    kills="matrix-is-the-master",
    examples=8,
)
def numbers(case: Case) -> None:
    maps = Maps(case, content="even", sensitive=case.boolean("kept"), bias=False, rows=(1,))
    form, m = maps.form, maps.linear().matrix().detach()
    if form.block is None:
        case.equal(m.to(DTYPES[form.compute]).to(m.dtype), m, f"the matrix in {form.compute}")
        return
    stack = _stack(m)
    grid = _Grid(stack, form.block)
    for index in range(len(grid)):
        found = len(set(stack[grid[index]].flatten().tolist()))
        case.require(found <= 2**form.bits, f"{found} values of {form.bits} bits share a scale")


@of_maps(
    "blocks",
    "a block of the declared size has a scale of its own: another's weights do not change it",
    kills="tail-block-cut-evenly",
    examples=8,
)
def blocks_alone(case: Case) -> None:
    maps = Maps(case, content="even", sensitive=False, bias=False, rows=(1,))
    value = _stack(maps.weight_values)
    # Without a scale each element is alone.
    grid = _Grid(value, maps.form.block or (1, 1))
    group, rows, columns = grid[case.integer("block", 0, 10**6) % len(grid)]
    changed = value * (2.0 if maps.half else 2.0**9)
    changed[group, rows, columns] = value[group, rows, columns]
    shape = maps.weight_values.shape
    before, after = (_stack(maps.linear(each.view(shape)).matrix().detach()) for each in (value, changed))
    told = f"the block at {group, rows.start, columns.start} of the matrix"
    case.equal(after[group, rows, columns], before[group, rows, columns], told)


class _Grid:
    """Every block of every matrix of a stack, those at the edges perhaps smaller; 0 stands for all."""

    def __init__(self, stack: Tensor, block: tuple[int, int]) -> None:
        self.size = tuple(size or length for size, length in zip(block, stack.shape[1:], strict=True))
        down, across = (-(-length // size) for length, size in zip(stack.shape[1:], self.size, strict=True))
        self.number = len(stack), down, across

    def __len__(self) -> int:
        return prod(self.number)

    def __getitem__(self, index: int) -> tuple[int, slice, slice]:
        rest, column = divmod(index, self.number[2])
        group, row = divmod(rest, self.number[1])
        top, left = row * self.size[0], column * self.size[1]
        return group, slice(top, top + self.size[0]), slice(left, left + self.size[1])


def _stack(m: Tensor) -> Tensor:
    return m[None] if m.ndim == 2 else m


@of_maps(
    "straight-through",
    "the matrix has the gradient of the weight itself",
    kills="matrix-without-a-gradient",
    examples=8,
)
def straight_through(case: Case) -> None:
    maps = Maps(case, rows=(1,))
    linear = maps.linear()
    if maps.codec is not None:
        case.equal(
            list(linear.parameters()), [linear.bias] * (linear.bias is not None), "parameters beside codes"
        )
        return
    m = linear.matrix()
    case.require(m.requires_grad, "the matrix has no gradient")
    gradient = case.normal("of the matrix", *m.shape, dtype=m.dtype)
    m.backward(gradient)
    case.equal(linear.weight.grad, gradient.to(linear.weight.dtype), "the gradient of the weight")


@of_maps("fresh", "what was computed from old weights is never used again", kills="matrix-stale", examples=12)
def fresh(case: Case) -> None:
    maps = Maps(case)
    linear, other = maps.linear(), maps.weight_values.flip(-1) * 0.75 + 1
    evaluated = case.boolean("evaluated")
    linear.train(not evaluated)
    _use(maps, linear, evaluated)
    new = maps.linear(other)
    way = case.choice("by", ("copy_", "data", "load_state_dict", "state_dict"))
    if way == "load_state_dict":
        linear.load_state_dict(new.state_dict())
    else:
        held = dict(linear.named_parameters()) | dict(linear.named_buffers())
        for name, value in new.state_dict().items():
            with torch.no_grad():
                if way == "copy_":
                    held[name].copy_(value)
                elif way == "data":
                    held[name].data = value.clone()
                else:
                    linear.state_dict()[name].copy_(value)
    case.equal(linear.matrix().detach(), new.matrix().detach(), f"the matrix after {way}")
    for name, each in _use(maps, new, evaluated).items():
        case.equal(_use(maps, linear, evaluated)[name], each, f"{name} after {way}")


def _use(maps: Maps, linear: Any, evaluated: bool) -> dict[str, Tensor]:
    if not evaluated:
        return maps.run(linear)
    with torch.no_grad():
        linear.matrix()
        return {"output": linear(maps.x, *maps.offsets(maps.ends))}


@of_maps(
    "dtypes",
    "outputs are in the dtype asked for, gradients in that of what they are of, and shapes are kept",
    kills="output-in-the-inputs-dtype",
)
def dtypes(case: Case) -> None:
    maps = Maps(case, rows=(0, 1, 6, 12))
    linear = maps.linear()
    case.require(isinstance(linear, PolicyLinear), "the map is no PolicyLinear: weight, bias, dtype, matrix")
    if maps.given is not None:
        case.equal(linear.dtype, DTYPES[maps.given], "the dtype of the map that one was asked of")
    elif not maps.sensitive:
        case.equal(linear.dtype, DTYPES[maps.config.activations], "the dtype of a map that none was asked of")
    x = maps.x.to(DTYPES[case.choice("x is in", FLOATING)])
    if maps.ends is None:
        x = x.view(*case.choice("leading", ((-1,), (1, -1), (-1, 1, 1))), x.shape[-1])
    x.requires_grad_()
    y = linear(x, *maps.offsets(maps.ends))
    case.equal(
        (tuple(y.shape), y.dtype), ((*x.shape[:-1], maps.declared.outputs), linear.dtype), "the output"
    )
    found = maps.run(linear)
    sizes = {"input": maps.x, "weight": linear.weight, "bias": linear.bias}
    for name in found.keys() - {"output"}:
        of = sizes[name]
        case.equal(
            (found[name].shape, found[name].dtype), (of.shape, of.dtype), f"the gradient of the {name}"
        )
    wanted = DTYPES[maps.form.storage]
    case.equal(linear.weight.dtype, wanted, "the dtype of the weight")


@of_maps(
    "state",
    "a map holds the tensors that it is given, and nothing else; a cast leaves codes as they are",
    kills="codes-are-cast",
    examples=8,
)
def state(case: Case) -> None:
    maps = Maps(case, rows=(1,))
    linear = maps.linear()
    weight = attrs.evolve(maps.declared.weight, name="weight")
    stored = [attrs.evolve(weight, dtype=maps.form.storage)]
    if maps.codec is not None:
        stored = list(maps.codec.config.stored(weight))
    if maps.declared.bias:
        form = maps.config.format(ROLE, maps.declared.weights[1], maps.sensitive)
        stored.append(attrs.evolve(maps.declared.weights[1], name="bias", dtype=form.storage))
    found = {name: _kind(each) for name, each in linear.state_dict().items()}
    case.equal(found, {each.name: str(each.dtype) for each in stored}, "the state")
    trains = {name for name, _ in linear.named_parameters()}
    case.equal(trains, {each.name for each in stored if each.trains}, "what trains")
    if maps.codec is None:
        return
    before = {name: each.clone() for name, each in linear.named_buffers()}
    cast = linear.to(DTYPES[case.choice("cast to", ("float16", "bfloat16", "float64"))])
    for name, each in cast.named_buffers():
        case.equal(each, before[name], f"{name} after a cast of the model")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@law(
    "precision",
    "formats",
    "every tensor of a model has a format that can be stored, updated and reduced; a dtype that a part fixes wins",
    kills="fixed-dtype-ignored",
    applies=serves_cpus,
)
def formats(case: Case) -> None:
    spec, config = case.spec, case.config
    fixed = case.choice("fixed", ("float32", "bfloat16", "float64", "int64", "bool"))
    held = Weight(name="held", shape=(3, 5), dtype=fixed, trains=fixed in FLOATS)
    for sensitive in (True, False):
        found = config.format("layers.0.ffn.held", held, sensitive)
        case.equal((found.storage, found.codec), (fixed, None), "the storage of what its part fixes")
    linears = spec.plan.linears
    case.require(config.activations in FLOATS, f"activations are {config.activations}")
    for name, weight in spec.plan.tensors.items():
        owner = name.rpartition(".")[0]
        linear = linears.get(owner)
        role = name if linear is None else owner
        sensitive = linear is None or linear.sensitive
        form = config.format(role, weight, sensitive)
        _sound(case, name, form)
        if weight.dtype is not None:
            case.equal(form.storage, weight.dtype, f"{name}: the storage of what its part fixes")
            continue
        case.equal(config.format(role, weight, sensitive), form, f"{name}: the format, asked again")
        if linear is not None and not linear.sensitive:
            kept = config.format(role, weight, True)
            case.require(kept.bits >= form.bits, f"{name}: fewer bits where it is sensitive")
        if linear is not None:
            declared = config.rounding(role, weight, sensitive)
            case.require(isinstance(declared, Rounding), f"{name}: rounding is a {type(declared).__name__}")
    for name, each in spec.formats.stored.items():
        case.require(str(each.dtype) in DTYPES, f"{name}: stored in {each.dtype}, which is no dtype")


def _sound(case: Case, name: str, form: Format) -> None:
    for role in ("storage", "compute", "gather", "gradient", "moment"):
        found = getattr(form, role)
        case.require(found in BITS and found in DTYPES, f"{name}: {role} is {found!r}, which is no dtype")
    case.require(form.gradient in FLOATS, f"{name}: gradients are {form.gradient}")
    case.require(0 < form.bits <= BITS[form.compute], f"{name}: {form.bits} bits, computed in {form.compute}")
    case.require(form.scale is None or form.scale in FLOATS, f"{name}: scales are {form.scale!r}")
    case.require(
        (form.block is None) == (form.scale is None), f"{name}: a block, or a scale, without the other"
    )
    case.require(form.block is None or min(form.block) >= 0, f"{name}: blocks of {form.block}")
    if form.codec is None:
        case.require(
            form.storage in FLOATS or form.storage == form.compute, f"{name}: stored in {form.storage}"
        )
    else:
        case.require(form.codec in case.subject.registry.kinds("codec"), f"{name}: no codec {form.codec!r}")
