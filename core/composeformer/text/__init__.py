"""Text in and out: tokenizers, streaming decoders and chat templates of Hugging Face folders."""

from composeformer.text.chat import render_chat
from composeformer.text.files import TOKENIZER_FILES, copy_tokenizer
from composeformer.text.stream import Stream
from composeformer.text.tokenizer import Tokenizer

__all__ = ["TOKENIZER_FILES", "Stream", "Tokenizer", "copy_tokenizer", "render_chat"]
