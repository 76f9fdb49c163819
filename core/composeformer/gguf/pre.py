"""How text is cut before byte-pair merging, by the name that a GGUF file gives it (`tokenizer.ggml.pre`).

The patterns are not in the file. They are llama.cpp's (src/llama-vocab.cpp, `llm_tokenizer_bpe`), a list per
name, applied one after the other, each within the pieces of the one before: a sequence of isolating splits.
Converters that take GPT-2's pattern for every name cut `x  2` elsewhere and feed the model ids it never saw.
"""

import attrs

from composeformer.errors import DialectError, nearest, one_of, show

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4's pattern with at most `%s` digits in a piece; llama.cpp spells the case-blind contractions out.
CL100K = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@attrs.frozen
class Pre:
    """How text is cut before merging, and what llama.cpp assumes for this name when the file does not say."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is that token, whatever the merges say
    add_bos: bool = False


_GPT2 = Pre((GPT2,))
_DIGITS_GPT2 = Pre((r"\p{N}", GPT2))
_LLAMA3 = Pre((CL100K % "{1,3}",), whole_words=True, add_bos=True)
_QWEN2 = Pre((CL100K % "",))

PRE: dict[str, Pre] = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": Pre(_LLAMA3.patterns),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
}


def find_pre(name: str) -> Pre:
    """The cutting of that name. Raises DialectError for one whose patterns are not known here."""
    if name not in PRE:
        near = nearest(name, PRE)
        hint = f"; did you mean {near!r}?" if near else ""
        raise DialectError(f"tokenizer.ggml.pre = {show(name)}: allowed are {one_of(PRE)}{hint}")
    return PRE[name]
