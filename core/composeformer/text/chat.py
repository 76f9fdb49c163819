"""A conversation as the text its model was trained on, by the model's own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from composeformer.errors import InputError
from composeformer.text.budget import MAX_SIZE
from composeformer.text.sandbox import environment

MAX_TEMPLATE = 1 << 20


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    bos: str | None,
    eos: str | None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of `messages` (each with `role` and `content`) by the Jinja `template`.

    `bos` and `eos` are the template's `bos_token` and `eos_token`; `variables` are further names it may ask
    for (`enable_thinking`, ...). The text holds its special tokens already: encode it with
    `add_special=False`.

    Raises InputError for a template that is malformed, refuses the conversation, reaches for what the sandbox
    does not give, or does work or makes text out of proportion; MissingExtra without jinja2.
    """
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"chat template: {len(template)} characters, at most {MAX_TEMPLATE} are allowed")
    jinja = environment()
    # Absent tokens stay undefined, as in transformers: a template can ask whether they are.
    tokens = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}
    values = {
        **tokens,
        **(variables or {}),
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    pieces: list[str] = []
    size = 0
    try:
        for piece in jinja.from_string(template).generate(values):
            size += len(piece)
            if size > MAX_SIZE:
                raise InputError(f"chat template: made more than {MAX_SIZE} characters")
            pieces.append(piece)
    except InputError:
        raise
    except Exception as problem:  # whatever a stranger's program can raise
        line = getattr(problem, "lineno", None)
        where = f"chat template, line {line}" if isinstance(line, int) else "chat template"
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise InputError(f"{where}: {reason}") from None
    return "".join(pieces)
