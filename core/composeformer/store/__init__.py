"""Model folders: written, read, imported, exported, compared."""

from composeformer.store.converting import export_model, import_model
from composeformer.store.loading import describe, load
from composeformer.store.saving import save
from composeformer.store.speaking import generate, tokenizer_of
from composeformer.store.comparing import Verdict, verify

__all__ = ["Verdict", "describe", "export_model", "generate", "import_model", "load", "save", "tokenizer_of", "verify"]
