"""What an objective sees of a batch's rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from composeformer.train import TokenBatch

NAMES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=5)


@given(NAMES, st.integers(0, 2**16))
def test_documents_have_numbers_of_their_own_whatever_they_are_called(
    runs: list[tuple[int, int]], seed: int
) -> None:
    names = [name for name, length in runs for _ in range(length)]
    valid = torch.rand(1, len(names), generator=torch.Generator().manual_seed(seed)) < 0.7
    batch = TokenBatch(torch.zeros(1, len(names), dtype=torch.int64), valid, torch.tensor([names])).seen()
    assert batch.documents is not None
    real = [name for name, there in zip(names, valid[0].tolist(), strict=True) if there]
    changes = [place > 0 and real[place - 1] != name for place, name in enumerate(real)]
    wanted = torch.tensor(changes, dtype=torch.int64).cumsum(0)
    assert torch.equal(batch.documents[valid], wanted)
