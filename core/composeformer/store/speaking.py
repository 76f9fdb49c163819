"""Generation from a loaded model: its folder's tokenizer is at hand."""

from pathlib import Path
from typing import Any

from composeformer.decoder import Model
from composeformer.generation import generate as continue_prompts
from composeformer.text import Tokenizer


def tokenizer_of(model: Model) -> Tokenizer | None:
    """The tokenizer of the folder a model was loaded from, or None where there is none."""
    folder = getattr(model, "folder", None)
    if folder is None or not (Path(folder) / "tokenizer.json").exists():
        return None
    return Tokenizer(folder)


def generate(model: Model, prompt: Any, **options: Any) -> Any:
    """Continues a prompt (text, ids, or a list of either) as `composeformer.generation.generate` does.

    Returns the new text for one string, else a list of `Generation`. The tokenizer is the folder's unless given. Where
    the model is spread over processes each calls it, with prompts of its own, or none: `[]`.
    """
    options.setdefault("tokenizer", tokenizer_of(model))
    found = continue_prompts(model, prompt, **options)
    return found[0].text if isinstance(prompt, str) else found
