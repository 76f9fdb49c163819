"""A plugin of somebody's own, written as a whole package that works: what `compose plugins new` does.

The templates are data, one folder for each slot, in the shape in which they are written; what they compute is a
small, correct part of that slot, to be changed. Nothing here imports torch.
"""

from composeformer.scaffold.names import Names, named
from composeformer.scaffold.starts import STARTS
from composeformer.scaffold.writing import Created, create

__all__ = ["STARTS", "Created", "Names", "create", "named"]
