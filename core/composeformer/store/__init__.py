"""Model folders: written, read, imported, exported, compared."""

from composeformer.store.convert import export_model, import_model
from composeformer.store.load import describe, load
from composeformer.store.save import save
from composeformer.store.text import generate, tokenizer_of
from composeformer.store.verify import Verdict, verify

__all__ = ["Verdict", "describe", "export_model", "generate", "import_model", "load", "save", "tokenizer_of", "verify"]
