"""The museum's table: for each wrong variant of our parts, the law that told it apart, after how many cases.

    python benchmarks/museum.py        prints the table and writes benchmarks/results/museum.json
"""

import json
import platform
import re
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "museum.json"
# Where some mutants write: another at every run.
FOLDER = re.compile(re.escape(tempfile.gettempdir()) + r"/[^/\s]+")
sys.path.insert(0, str(ROOT / "tests" / "museum"))


def main() -> None:
    from museum_kit import everything, kill

    torch.set_num_threads(1)
    rows = []
    started = perf_counter()
    for mutant in everything().values():
        begun = perf_counter()
        finding = kill(mutant)
        row = {
            "mutant": mutant.name,
            "bug": mutant.told,
            "source": mutant.source,
            "component": f"{mutant.slot} {mutant.kind} ({mutant.implementation})",
            "killed_by": None if finding is None else finding.law,
            "examples": None if finding is None else finding.cases,
            "why": None if finding is None else FOLDER.sub("FOLDER", finding.why)[:160],
            "seconds": round(perf_counter() - begun, 2),
        }
        rows.append(row)
        print(f"| {row['mutant']} | {row['bug']} | {row['killed_by']} | {row['examples']} |", flush=True)
    survivors = [row["mutant"] for row in rows if row["killed_by"] is None]
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "torch": torch.__version__,
        "mutants": len(rows),
        "survivors": survivors,
        "seconds": round(perf_counter() - started, 1),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} mutants, {len(survivors)} survive; {result['seconds']} s")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
