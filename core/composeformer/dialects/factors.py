"""Rotary parameters that a file gives only as numbers: GGUF stores what Llama 3.1 divides each frequency by.

The tensor holds one divisor per pair of features (arXiv 2407.21783; llama.cpp's converter). A dialect file
states the parameters of the released models; the factor is read off the longest wavelength, and every divisor
must then be what the parameters give, or the file is refused.
"""

from collections.abc import Sequence
from math import pi

import attrs

from composeformer.dialects.parsing import Table
from composeformer.errors import DialectError

TOLERANCE = 1e-4


@attrs.frozen(kw_only=True)
class Factors:
    """Divisors of theirs, and the part of ours that has them."""

    theirs: str
    ours: str
    kind: str
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def fields(self, divisors: Sequence[float], theta: float) -> dict[str, object]:
        """The fields of our part by path. Raises DialectError where the divisors are others."""
        factor = float(f"{divisors[-1]:.6g}")
        for index, found in enumerate(divisors):
            wanted = self._divisor(2 * pi * theta ** (index / len(divisors)), factor)
            if not abs(found - wanted) <= TOLERANCE * wanted:
                known = f"{self.kind} with original length {self.original_max_position_embeddings}"
                raise DialectError(f"{self.theirs}: divisor {index} is {found:.6g}, {known} has {wanted:.6g}")
        own = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        fields = {"kind": self.kind, "factor": factor, **{name: getattr(self, name) for name in own}}
        return {f"{self.ours}.{name}": value for name, value in fields.items()}

    def _divisor(self, length: float, factor: float) -> float:
        turns = self.original_max_position_embeddings / length
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - kept) / factor + kept)


def factors_line(theirs: str, table: object, where: str) -> Factors:
    t = Table(table, where)
    made = Factors(
        theirs=theirs,
        ours=str(t.text("ours", required=True)),
        kind=str(t.text("kind", required=True)),
        low_freq_factor=t.take("low_freq_factor", required=True),
        high_freq_factor=t.take("high_freq_factor", required=True),
        original_max_position_embeddings=t.take("original_max_position_embeddings", required=True),
    )
    t.done()
    return made
