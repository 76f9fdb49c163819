"""The command line: `compose COMMAND`. Each command is a module of this package, imported when it runs.

Exit status: 0 done; 1 a comparison, a law or a diagnosis failed; 2 the input was wrong, or a file or stream
could not be read or written; 70 an internal error; 130 interrupted; 143 terminated. This module imports
next to nothing: an interrupt that comes while the rest is imported is told like any other.
"""

import sys

TYPE_CHECKING = False  # as typing's, whose import costs time

if TYPE_CHECKING:
    from typing import NoReturn

# Static, so that help needs no command's imports.
COMMANDS = {
    "build": "Assemble a model from a spec; with -o write a model folder.",
    "check": "Validate specs and nothing else.",
    "show": "A spec's component tree, precision by role, and where values come from.",
    "cost": "What a spec is, needs and costs, every number with its definition.",
    "diff": "Two specs side by side, and why one costs more than the other.",
    "resize": "Change a part, hold a quantity: widths are solved, a new spec is written.",
    "plugins": "What is installed, from where; start a plugin, prove one.",
    "schema": "JSON Schema of specs, for editors.",
    "import": "A Hugging Face folder or a GGUF file becomes a model folder.",
    "export": "A model folder becomes a plain Hugging Face folder.",
    "verify": "Compare two models: structure, tensors, outputs; name the first difference.",
    "generate": "Text from a model folder, streamed.",
    "doctor": "What this machine offers, and why not.",
    "completion": "A script that completes commands in your shell.",
}


def main() -> "NoReturn":
    """Runs the command line and exits; no traceback reaches a user without --debug."""
    try:
        from composeformer.cli.running import run

        code = run()
    except KeyboardInterrupt:
        code = 130
        if sys.stderr is not None:
            sys.stderr.write("compose: interrupted\n")
    sys.exit(code)
