"""Text from a built model: prompts in, sampling, stop strings, streaming."""

from composeformer.generate.loop import Piece, generate, stream
from composeformer.generate.prompts import Prompts, TextStream, Tokenizer
from composeformer.generate.rows import FinishReason, Generation
from composeformer.generate.sampling import Sampling

__all__ = [
    "FinishReason",
    "Generation",
    "Piece",
    "Prompts",
    "Sampling",
    "TextStream",
    "Tokenizer",
    "generate",
    "stream",
]
