"""Where a model's parameters are: by role, the same one in all layers together, and by layer.

A role is the dotted name of a linear map or of another tensor, without `.weight`; the number of a layer in it is `*`.
What is shared is counted with its owner, buffers are left out, and the predictor's roles are beside the total.
"""

from collections import Counter
from itertools import groupby

from composeformer.costs.counts import parameters
from composeformer.spec import Spec


def by_role(spec: Spec) -> dict[str, int]:
    """Parameters of every role, in the order of the model; they sum to its total and the predictor's own."""
    found: Counter[str] = Counter()
    for node in spec.plan.nodes():
        for name, weight in node.tensors():
            if weight.trains and weight.same_as is None:
                found[_role(name)] += weight.elements
    return dict(found)


def by_layer(spec: Spec) -> list[int]:
    """Parameters of each layer, its norms included; the ends of the model are in none."""
    found = [0] * len(spec.layers)
    own = set() if spec.plan.predictor is None else set(spec.plan.predictor.walk())
    for node in spec.plan.nodes():
        if node.site.layer is not None and node not in own:
            found[node.site.layer] += parameters(node)
    return found


def alike(numbers: list[int]) -> list[tuple[int, int, int]]:
    """Runs of equal numbers: first and last index, and the number."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1])]
    return [(run[0][0], run[-1][0], run[0][1]) for run in runs]


def _role(name: str) -> str:
    steps = ["*" if step.isdigit() else step for step in name.split(".")]
    return ".".join(steps[:-1] if steps[-1] == "weight" and len(steps) > 1 else steps)
