"""A law of parts that promise to say what training keeps of them: autograd keeps that, and no more.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterator

import torch

from composeformer.assemble import in_dtype
from composeformer.costs.activations import Training, per_token, unknown
from composeformer.errors import one_of
from composeformer.plan import Node
from composeformer.spec import Spec
from composeformer.testing.activations import counted
from composeformer.testing.calling import uncalled
from composeformer.testing.case import Case
from composeformer.testing.law import EVERYWHERE, law

# Of what is counted: small things are not worth a declaration.
WITHIN = 0.1
# So many that what is kept of each token shows beside what all of them share.
ROWS, TOKENS = 64, 64


@law(
    EVERYWHERE,
    "kept",
    "what autograd keeps of each token in training is what is declared, within 10%, of it or of the part around it",
    kills="up-is-kept-and-not-told",
    claimed=True,
    applies=uncalled,
    examples=4,
)
def kept(case: Case) -> None:
    spec = case.spec
    if case.dtype == torch.float64:
        spec = in_dtype(spec, "float32")  # nobody trains in it, and what is kept of a choice is another thing there
    own = case.subject.component
    top = next(top for top in _tops(spec) if any(node.part.component is own for node in top.walk()))
    nodes = [*top.walk()]
    case.require(not unknown(n for n in nodes if n.part.component is own), "it does not say what training keeps")
    if silent := unknown(nodes):
        case.draw.reject(f"{one_of(silent)} does not say what training keeps")
    told = per_token(nodes, Training(context=TOKENS, device="cpu"))
    modules = counted(spec, ROWS, TOKENS).items()
    found = sum(size for name, size in modules if f"{name}.".startswith(f"{top.path}."))
    case.within(
        abs(told - found), WITHIN * found, f"{told:g} bytes of a token are declared of {top.path}, {found:g} kept"
    )


def _tops(spec: Spec) -> Iterator[Node]:
    """The parts that are in no other: a child's input may be the parent's own, which one of both keeps."""
    plan = spec.plan
    yield from (plan.embedding, plan.residual, plan.head)
    yield from (node for layer in plan.layers for node in layer.values())
    if plan.predictor is not None:
        yield plan.predictor
