"""Why two models differ: the known conventions that turn one into the other, found by trying them.

A change is one thing that may have been told or stored otherwise. Three sources give changes, none of which knows a
component:

- `meaning`: what the two specs say otherwise, one field at a time, wherever it stands (an eps, a theta, a group score);
- `tensors`: how tensors that differ are related: an order, an exchange, a scale, as parts state in their
  `conventions`, or as any tensor can be;
- `choices`: other choices of a field where both specs say the same, and the tensors here were stored for another.

`trials` applies changes to the model in question and runs it, in full precision, on the same tokens; `search` looks for
the fewest that move the first differing component behind the last one, and tells them in the order in which they act.
"""

from composeformer.store.bisecting.explanation import Explanation, harmless
from composeformer.store.bisecting.search import explain

__all__ = ["Explanation", "explain", "harmless"]
