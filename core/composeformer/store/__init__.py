"""Model folders: written, read, imported, exported, compared."""

from composeformer.store.comparing import Verdict, verify
from composeformer.store.converting import export_model, import_model
from composeformer.store.loading import describe, load
from composeformer.store.saving import save
from composeformer.store.speaking import generate, tokenizer_of

__all__ = [
    "Verdict",
    "describe",
    "export_model",
    "generate",
    "import_model",
    "load",
    "save",
    "tokenizer_of",
    "verify",
]
