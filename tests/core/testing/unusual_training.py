"""What trains and stores: losses that are not plain cross-entropy, steps of one size, codes that index a table.

Shapes: B rows, T tokens, V vocabulary; O outputs, I inputs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from composeformer.config import Config, config, field
from composeformer.contracts import Component, Implementation, Weight
from composeformer.errors import InputError
from composeformer.rounding import Operand
from composeformer.tensors import Batch, ModelOutput
from composeformer.train import Trained


@config
class Focal(Config):
    """Cross-entropy of the next token, less where it is sure already: -(1 - p)^g log p (arXiv 1708.02002)."""

    gamma: float = field(2.0, minimum=1.0, maximum=4.0, affects="training", help="How much less.")


class FocalLoss:
    def __init__(self, config: Focal) -> None:
        self.gamma = config.gamma

    def learnt(self, batch: Batch) -> Tensor:
        """Which tokens have a label: the next one, real and of the same document."""
        found = torch.ones_like(batch.ids[:, 1:], dtype=torch.bool)
        if batch.valid is not None:
            found = found & batch.valid[:, 1:] & batch.valid[:, :-1]
        if batch.documents is not None:
            found = found & (batch.documents[:, 1:] == batch.documents[:, :-1])
        return found

    def weight(self, batch: Batch) -> Tensor:
        return self.learnt(batch).sum()

    def __call__(self, outputs: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        learnt = self.learnt(batch)
        logs = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0][learnt]
        return -((-torch.expm1(logs)) ** self.gamma * logs).sum(), learnt.sum()


@config
class Documents(Config):
    """The mean over each document of its cross-entropies: a short one counts as much as a long one."""


class DocumentsLoss(FocalLoss):
    def __init__(self, config: Documents) -> None:
        pass

    def documents(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which document each label is of, over all rows, and how many labels each has."""
        numbers = torch.zeros_like(batch.ids) if batch.documents is None else batch.documents
        rows = torch.arange(len(numbers), device=numbers.device)[:, None].expand(numbers.shape)
        both = torch.stack([rows, numbers], -1)[:, 1:][self.learnt(batch)]
        return both.unique(dim=0, return_inverse=True, return_counts=True)[1:]

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(self.documents(batch)[1]), device=batch.ids.device)

    def __call__(self, outputs: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        logs = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0][self.learnt(batch)]
        document, counts = self.documents(batch)
        return -(logs / counts[document]).sum(), self.weight(batch)


@config
class Normaliser(Config):
    """The square of the logarithm of what a softmax divides by (arXiv 2204.02311), and nothing else: no labels."""


class NormaliserLoss:
    def __init__(self, config: Normaliser) -> None:
        pass

    def real(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid

    def weight(self, batch: Batch) -> Tensor:
        return self.real(batch).sum()

    def __call__(self, outputs: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        real = self.real(batch)
        return logits[real].logsumexp(-1).square().sum(), real.sum()


@config
class LionConfig(Config):
    """Steps of the sign of a mean, each as large as the learning rate (arXiv 2302.06675)."""

    beta1: float = field(0.9, minimum=0.0, maximum=0.999, affects="training", help="Of the mean that steps.")
    beta2: float = field(
        0.99, minimum=0.0, maximum=0.999, affects="training", help="Of the mean that is kept."
    )
    weight_decay: float = field(0.1, minimum=0.0, maximum=1.0, affects="training", help="Of matrices.")


def evaluated(closure: Any) -> Any:
    """The loss of a closure, as PyTorch's optimizers compute it; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Lion(Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                sign = mean.lerp(parameter.grad, 1 - group["beta1"]).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(sign, alpha=group["lr"])
                mean.lerp_(parameter.grad, 1 - group["beta2"])
        return loss


def make_lion(config: LionConfig, trained: Sequence[Trained], learning_rate: float) -> Lion:
    groups: list[dict[str, Any]] = [
        {
            "params": [(one.name, one.parameter) for one in trained if one.is_matrix is matrices],
            "weight_decay": config.weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return Lion(groups, {"lr": learning_rate, "beta1": config.beta1, "beta2": config.beta2})


@config
class SignConfig(Config):
    """Steps of the gradient's sign, and no state at all (arXiv 1802.04434)."""


class SignDescent(Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
        return loss


def make_sign(config: SignConfig, trained: Sequence[Trained], learning_rate: float) -> SignDescent:
    return SignDescent([(one.name, one.parameter) for one in trained], {"lr": learning_rate})


CODES = 16


@config
class Table(Config):
    """A code of each weight names one of sixteen values of its column."""

    def stored(self, weight: Weight) -> tuple[Weight, ...]:
        values = Weight(
            name=f"{weight.name}_table",
            shape=(*weight.shape[:-2], CODES, weight.shape[-1]),
            dtype="float32",
            trains=False,
        )
        return attrs.evolve(weight, dtype="uint8", trains=False, init=None), values

    @property
    def rounding(self) -> Operand:
        # Half of what is from one value to the next, which is at most twice the column's largest over thirteen.
        return Operand(shared=(1 / (CODES - 3)) * (1 + 2.0**-20), block=(0, 1))

    def cut(self, dim: int, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        return (start, stop), (0, CODES) if dim == -2 else (start, stop)


class TableCodec:
    """A column of few values has a table of just these; another one zero, and fifteen from its least to its largest."""

    def __init__(self, config: Table) -> None:
        pass

    def encode(self, value: Tensor) -> tuple[Tensor, Tensor]:
        value = value.float()
        if not value.isfinite().all():
            raise InputError("table: a weight holds NaN or infinity, which no table does")
        columns = value.mT.reshape(-1, value.shape[-2])
        tables = torch.stack([self.table(column) for column in columns])  # (N, 16)
        codes = (columns[:, :, None] - tables[:, None]).abs().argmin(-1)
        shape = (*value.shape[:-2], value.shape[-1])
        return codes.to(torch.uint8).view(*shape, -1).mT.contiguous(), tables.view(
            *shape, CODES
        ).mT.contiguous()

    def table(self, column: Tensor) -> Tensor:
        own = column.unique()
        if len(own) > CODES:
            least, largest = own[0].double(), own[-1].double()
            steps = torch.linspace(0, 1, CODES - 1, dtype=torch.float64)
            own = torch.cat([(least + (largest - least) * steps).float(), own.new_zeros(1)]).unique()
        return torch.cat([own, own[-1:].expand(CODES - len(own))])

    def decode(
        self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32, rows: slice | None = None
    ) -> Tensor:
        codes, tables = parts
        codes = codes if rows is None else codes[..., rows, :]
        return tables.gather(-2, codes.long()).to(dtype)

    def wrong(self, place: int, part: Tensor) -> str | None:
        if place == 0:
            return "a code beyond the table" if bool((part >= CODES).any()) else None
        return None if bool(part.isfinite().all()) else "a value that is not finite"


def components() -> Iterable[Component]:
    for slot, kind, made, module, claims in (
        ("objective", "focal", Focal, "FocalLoss", ("renamed", "shift")),
        ("objective", "documents", Documents, "DocumentsLoss", ("renamed", "shift")),
        ("objective", "normaliser", Normaliser, "NormaliserLoss", ("renamed",)),
        ("optimizer", "lion", LionConfig, "make_lion", ("each-alone", "elementwise", "still-at-zero")),
        (
            "optimizer",
            "sign",
            SignConfig,
            "make_sign",
            ("each-alone", "elementwise", "still-at-zero", "moments"),
        ),
        ("codec", "table", Table, "TableCodec", ()),
    ):
        reference = Implementation("reference", f"{__name__}:{module}")
        yield Component(slot, kind, made, (reference,), claims=claims)


COMPONENTS = tuple(components())
