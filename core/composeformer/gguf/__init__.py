"""GGUF files, read only: metadata, tensors as float32, and the tokenizer they carry."""

from composeformer.gguf.header import TensorInfo
from composeformer.gguf.reader import GGUFFile, open_gguf
from composeformer.gguf.tokenizer import write_tokenizer

__all__ = ["GGUFFile", "TensorInfo", "open_gguf", "write_tokenizer"]
