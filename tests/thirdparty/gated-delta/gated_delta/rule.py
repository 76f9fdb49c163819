"""The gated delta rule (arXiv 2412.06464, equation 10), token by token and in chunks.

    S_t = a_t S_{t-1} + k_t u_t^T        u_t = b_t (v_t - a_t S_{t-1}^T k_t)        o_t = S_t^T q_t

With D_ij = a_{j+1} .. a_i for j <= i, and D_i = a_1 .. a_i, a chunk that begins with the state S is the solution of
a triangular system (the WY form: arXiv 2406.06484, section 3; with decays: arXiv 2412.06464, section 3.3):

    u_i + b_i sum_{j<i} D_ij (k_i . k_j) u_j = b_i v_i - b_i D_i S^T k_i
    o_i = D_i S^T q_i + sum_{j<=i} D_ij (q_i . k_j) u_j

A token that starts a document forgets the state first: it and those after it see nothing before it.

Shapes: B rows, T tokens, H heads, K features of a key, V of a value; N chunks of C tokens.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


class Steps(NamedTuple):
    """What a token does to the state and reads from it; `g` is log a. With g = b = 0 it leaves the state as it is."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T H K"]
    v: Float[Tensor, "B T H V"]
    g: Float[Tensor, "B T H"]
    b: Float[Tensor, "B T H"]


Starts = Bool[Tensor, "B T"] | None
Scanned = tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]


def recurrent(steps: Steps, starts: Starts, state: Float[Tensor, "B H K V"]) -> Scanned:
    """What each token reads, and the state behind the last: as the equation has it."""
    read = []
    for t in range(steps.k.shape[1]):
        q, k, v, g, b = (each[:, t] for each in steps)
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        state = g.exp()[..., None, None] * state
        held = (k[..., None, :] @ state).squeeze(-2)
        state = state + k[..., None] @ (b[..., None] * (v - held))[..., None, :]
        read.append((q[..., None, :] @ state).squeeze(-2))
    return torch.stack(read, 1), state


def chunked(steps: Steps, starts: Starts, state: Float[Tensor, "B H K V"], size: int) -> Scanned:
    """The same, `size` tokens at a time by matrix products; equal but for rounding."""
    tokens = steps.k.shape[1]
    size = min(size, tokens)
    rest = -tokens % size
    q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, rest)).unflatten(2, (-1, size)) for x in steps[:3])
    g, b = (F.pad(x.transpose(1, 2), (0, rest)).unflatten(2, (-1, size)) for x in steps[3:])
    # From each token of a chunk to each: sums, and no differences of sums from the chunk's start, which would cancel.
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = g[..., None].masked_fill(~seen.tril(-1), 0).cumsum(-2)
    before = g.cumsum(-1)
    if starts is not None:
        begun = F.pad(starts, (0, rest)).unflatten(1, (-1, size)).cumsum(-1)[:, None]
        seen = seen & (begun[..., :, None] == begun[..., None, :])
        before = before.masked_fill(begun > 0, -torch.inf)
    between = between.masked_fill(~seen, -torch.inf).exp()
    before, behind = before.exp()[..., None], between[..., -1, :, None]
    system = (b[..., None] * k) @ k.mT * between  # its diagonal is taken as ones
    sides = torch.cat([b[..., None] * v, b[..., None] * before * k], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    given, taken = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores, q, k = q @ k.mT * between, before * q, behind * k
    read = []
    for n in range(q.shape[2]):
        u = given[:, :, n] - taken[:, :, n] @ state
        read.append(q[:, :, n] @ state + scores[:, :, n] @ u)
        state = before[:, :, n, -1:] * state + k[:, :, n].mT @ u
    return torch.cat(read, 2)[:, :, :tokens].transpose(1, 2), state
