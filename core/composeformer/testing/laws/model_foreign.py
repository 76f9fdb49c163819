"""Laws of models that other ecosystems can say: written as their folders and read back, they are the same."""

import tempfile
from pathlib import Path

import torch

import composeformer as cf
from composeformer.assemble import build, in_dtype
from composeformer.dialects import expressing
from composeformer.errors import ComposeError
from composeformer.testing.case import enliven
from composeformer.testing.models import ModelCase, model_law
from composeformer.testing.shrunk import shrunk


@model_law(
    "exported",
    "a model that a dialect can say is written as its family's folder and read back bit by bit",
    kills="an-export-states-the-usual-eps",
    examples=8,
)
def exported(case: ModelCase) -> None:
    """A folder of the family alone, without a spec beside: its config and tensors have to say everything."""
    data = case.draw("shrunk", shrunk(case.tried.registry))
    try:
        spec = in_dtype(case.spec_of(data), "float32")
        dialect, _ = expressing(spec)
    except ComposeError as error:
        case.draw.reject(str(error).splitlines()[0])
    seed = case.integer("seed of values", 0, 2**16)
    model = build(spec, seed=seed)
    enliven(model, seed)
    ids = torch.randint(spec.model.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, again = (Path(folder) / name for name in ("ours", "theirs", "again"))
        case.equal(cf.save(model, ours), dialect.name, "the dialect of a saved folder")
        case.equal(cf.export_model(ours, theirs), dialect.name, "the dialect of an exported folder")
        plain = cf.load(theirs, dtype="float32")
        cf.import_model(theirs, again)
        read = cf.load(again)
    for name, other in (("exported", plain), ("exported and imported", read)):
        case.equal(other.spec.fingerprint, spec.fingerprint, f"the fingerprint, {name}")
        case.same(other.state_dict(), model.state_dict(), name)
        with torch.no_grad():
            case.equal(other(ids).logits, model(ids).logits, f"logits, {name}")
