"""Text from a built model: prompts in, sampling, stop strings, streaming."""

from composeformer.generation.loop import Piece, generate, stream
from composeformer.generation.prompts import Prompts, TextStream, Tokenizer
from composeformer.generation.rows import FinishReason, Generation
from composeformer.generation.sampling import Sampling

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
