"""How long a user waits: `compose --help` beside `import click`, the torch-free commands, a big model on meta.

Each command runs several times, alternating with the import of click alone; the medians and their ratio are kept.

    python benchmarks/startup.py          prints the figures and writes benchmarks/results/startup.json
"""

import json
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

RESULT = Path(__file__).parent / "results" / "startup.json"
RUNS = 9
COMMANDS = {
    "compose --help": ["--help"],
    "compose check llama-3.1-405b": ["check", "llama-3.1-405b"],
    "compose cost llama-3.1-405b": ["cost", "llama-3.1-405b", "--json"],
    "compose cost deepseek-v3": ["cost", "deepseek-v3"],
    "compose cost deepseek-v3 --json": ["cost", "deepseek-v3", "--json"],
    "compose diff deepseek-v3 llama-3.1-405b": ["diff", "deepseek-v3", "llama-3.1-405b"],
    "compose plugins list": ["plugins", "list", "--json"],
    "compose schema": ["schema"],
}
META = """
from time import perf_counter
from composeformer.assemble import skeleton
from composeformer.spec import Spec
spec = Spec.load("llama-3.1-405b")
started = perf_counter()
skeleton(spec, device="meta")
print(perf_counter() - started)
"""


def seconds(command: list[str]) -> float:
    started = perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return perf_counter() - started


def main() -> None:
    compose = shutil.which("compose") or str(Path(sys.executable).with_name("compose"))
    figures: dict[str, object] = {}
    for name, arguments in COMMANDS.items():
        pairs = [
            (seconds([compose, *arguments]), seconds([sys.executable, "-c", "import click"]))
            for _ in range(RUNS)
        ]
        ours, click = (statistics.median(side) for side in zip(*pairs))
        figures[name] = {
            "seconds": round(ours, 3),
            "import_click": round(click, 3),
            "ratio": round(ours / click, 2),
        }
    runs = [
        subprocess.run([sys.executable, "-c", META], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    figures["llama-3.1-405b on meta, imports excluded"] = {
        "seconds": round(statistics.median(float(run.stdout) for run in runs), 3)
    }
    import torch

    figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    figures["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
