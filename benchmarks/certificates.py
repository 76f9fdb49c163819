"""Certificates of every installed component: each law, the cases tried, the worst error against its bound.

    python benchmarks/certificates.py [--examples 100] [--seed 1]

prints a line for each law of each part and writes benchmarks/results/certificates.json; exit 1 where a law is broken.
"""

import argparse
import json
import platform
import sys
from math import isfinite
from pathlib import Path
from time import perf_counter

import torch

from composeformer.testing import certify, subjects

RESULT = Path(__file__).parent / "results" / "certificates.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slot")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = perf_counter()
    tried = [each for each in subjects() if asked.slot in (None, each.slot)]
    rows = []
    for finding in certify(tried, examples=asked.examples, seed=asked.seed):
        share = finding.error / finding.bound if finding.bound else 0.0
        row = {
            "part": f"{finding.slot} {finding.kind} ({finding.implementation})",
            "law": finding.law,
            "verdict": finding.verdict,
            "cases": finding.cases,
            "error": float(f"{finding.error:.3g}") if isfinite(finding.error) else None,
            "bound": float(f"{finding.bound:.3g}"),
            "share": round(share, 4) if isfinite(share) else None,
            "seconds": round(finding.seconds, 2),
            "why": finding.why,
        }
        rows.append(row)
        print(*(str(row[name]) for name in ("part", "law", "verdict", "cases", "error", "bound")), flush=True)
        if not finding.held:
            print(finding, flush=True)
    broken = [f"{row['part']}: {row['law']}" for row in rows if row["verdict"] == "broken"]
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
        "torch": torch.__version__,
        "seed": asked.seed,
        "examples": asked.examples or "each law's own",
        "parts": len({row["part"] for row in rows}),
        "laws": len({row["law"] for row in rows}),
        "cases": sum(row["cases"] for row in rows),
        "broken": broken,
        "seconds": round(perf_counter() - started, 1),
        "rows": rows,
    }
    if asked.slot is None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['parts']} parts, {result['laws']} laws, {result['cases']} cases, {len(broken)} broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
