"""`compose generate`: text from a model folder, streamed. Of several processes the first makes it, all take part."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from composeformer.cli.options import device_options, json_option, print_json, progress, set_option
from composeformer.errors import ComposeError, InputError


@click.command(
    "generate",
    help="Continue a prompt, or answer in chat, with the model of FOLDER; greedy unless a temperature is given.",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue (repeatable: a batch). '-' reads standard input.",
)
@click.option(
    "--chat",
    "messages",
    multiple=True,
    help="A user's message, through the chat template (repeatable: a batch).",
)
@click.option("--system", help="A system message for --chat.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="End before this text (repeatable).")
@click.option(
    "--speculate", is_flag=True, help="Draft with the model's predictor and verify several tokens at once."
)
@set_option
@device_options
@json_option
def command(
    folder: Path,
    prompts: tuple[str, ...],
    messages: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    stop: tuple[str, ...],
    speculate: bool,
    settings: tuple[str, ...],
    device: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    if bool(prompts) == bool(messages):
        raise InputError("give --prompt or --chat" + ("; not both" if prompts else ""))
    if system is not None and not messages:
        raise InputError("--system needs --chat")
    if device == "meta":
        raise InputError("a model on the device meta has no values to generate with")
    from composeformer.generation import Sampling, generate
    from composeformer.store import load, tokenizer_of

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    with progress("loading") as advance:
        model = load(folder, device=device, dtype=dtype, overrides=settings, progress=advance)
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise InputError(f"{folder}: has no tokenizer.json, so it takes token ids only (from Python)")
    given = _given(model, tokenizer, prompts, messages, system)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "stop": stop,
        "speculate": speculate,
    }
    if model.placement.world.rank:
        generate(model, given, **options)
    elif as_json:
        rows = [
            {
                "text": row.text,
                "ids": list(row.ids),
                "finish_reason": row.finish_reason,
                "prompt_length": row.prompt_length,
                "steps": row.steps,
                "drafted": row.drafted,
                "accepted": row.accepted,
                "acceptance": row.acceptance,
                "tokens_per_step": row.tokens_per_step,
            }
            for row in generate(model, given, **options)
        ]
        print_json({"generations": rows})
    elif len(given) == 1:
        _stream(model, given, options)
    else:
        made = generate(model, given, **options)
        for index, row in enumerate(made):
            click.echo(f"[{index}] {row.text}")
        _report(sum(len(row.ids) for row in made), *(sum(n) for n in zip(*(row.drafting for row in made))))


def _given(
    model: Any, tokenizer: Any, prompts: tuple[str, ...], messages: tuple[str, ...], system: str | None
) -> list[Any]:
    """Prompts as text or ids; none in any process but the first, which alone reads standard input."""
    world = model.placement.world
    if world.rank:
        if told := world.first(None):
            raise InputError(*told.split("\n"))
        return []
    try:
        texts = [_standard_input() if prompt == "-" else prompt for prompt in prompts]
        chats = _chats(tokenizer, messages, system) if messages else []
        found = texts or [tokenizer.encode(text, add_special=False) for text in chats]
    except ComposeError as error:
        world.first("\n".join(error.lines))
        raise
    world.first("")
    return found


def _standard_input() -> str:
    if sys.stdin is None:
        raise InputError("--prompt -: standard input is closed")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt -: standard input is not {error.encoding} text") from None


def _stream(model: Any, given: Any, options: dict[str, Any]) -> None:
    from composeformer.generation import stream

    taken, last = 0, None
    # Other processes wait for each step, so one that can not be written ends the stream.
    with closing(stream(model, given, **options)) as pieces:
        for piece in pieces:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            taken, last = taken + len(piece.ids), piece
    sys.stdout.write("\n")
    if last is not None:
        _report(taken, *last.drafting)


def _report(taken: int, steps: int, drafted: int, accepted: int) -> None:
    """How drafts did, where there were any."""
    if drafted:
        share = f"{accepted} of {drafted} drafts accepted ({accepted / drafted:.1%})"
        click.echo(f"{share}, {taken / steps:.2f} tokens a step", err=True)


def _chats(tokenizer: Any, messages: tuple[str, ...], system: str | None) -> list[str]:
    from composeformer.text import render_chat

    if tokenizer.chat_template is None:
        raise InputError("this model has no chat template; use --prompt")
    first = [] if system is None else [{"role": "system", "content": system}]
    return [
        render_chat(
            [*first, {"role": "user", "content": message}],
            tokenizer.chat_template,
            bos=tokenizer.bos_token or "",
            eos=tokenizer.eos_token or "",
        )
        for message in messages
    ]
