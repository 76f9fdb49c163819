"""Laws of what travels between processes: the formats on paper are those of what is gathered and reduced.

A weight may be gathered in a narrower dtype than it is stored in, if it is rounded to no more than what is multiplied.
Gradients are reduced as they are: in the dtype of the parameter that they are of.
"""

from functools import partial

from composeformer.rounding import FLOATS
from composeformer.tensors import DTYPES
from composeformer.testing.case import Case
from composeformer.testing.law import law
from composeformer.testing.maps import ROLE, Maps, serves_cpus


@partial(law, "precision", applies=serves_cpus)(
    "travels",
    "a weight that was gathered in its declared dtype makes the same matrix; gradients have the dtype that they are"
    " declared to be reduced in",
    kills="gradients-travel-narrow-on-paper",
    examples=10,
)
def travels(case: Case) -> None:
    maps = Maps(case, rows=(1, 5), groups=False)
    if maps.codec is not None:
        # Codes travel as they are stored, and do not train.
        case.equal(maps.form.gather, maps.form.storage, "the dtype that codes are gathered in")
        return
    linear = maps.linear()
    declared = {"weight": maps.form}
    if maps.declared.bias:
        declared["bias"] = maps.config.format(ROLE, maps.declared.weights[1], maps.sensitive)
    for name, each in maps.run(linear).items():
        if name in declared:
            told = DTYPES[declared[name].gradient]
            case.equal(each.dtype, told, f"the dtype of the gradient of the {name}, and the one declared")
    case.require(maps.form.gather in FLOATS, f"weights that train are gathered in {maps.form.gather}")
    stored = maps.stored(maps.weight_values)
    gathered = stored.to(DTYPES[maps.form.gather]).to(stored.dtype)
    told_of = f"the matrix of a weight gathered in {maps.form.gather}"
    case.equal(maps.linear(gathered).matrix().detach(), linear.matrix().detach(), told_of)
