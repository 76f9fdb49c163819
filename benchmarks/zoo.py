"""The zoo: each shipped spec's numbers, and how long its construction on the meta device takes beside transformers.

Both construct the same model: transformers from the config that our dialect writes, its parameters counted equal
first. It builds no module of multi-token prediction, ours does. Runs alternate in one process, imports are done
before; reading the spec is part of ours, making the config is none of theirs. A ratio above 1 means that
composeformer is faster.

    python benchmarks/zoo.py        prints the figures and writes benchmarks/results/zoo.json
"""

import gc
import json
import logging
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

import composeformer as cf
from composeformer.dialects import expressing
from composeformer.spec import Spec, shipped

RESULT = Path(__file__).parent / "results" / "zoo.json"
RUNS = 9


def race(ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of both, run in turn, and theirs over ours. The first of each warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS + 1):
        for side, work in enumerate((ours, theirs)):
            gc.collect()
            started = perf_counter()
            work()
            times[side].append(perf_counter() - started)
    a, b = (statistics.median(side[1:]) for side in times)
    return {"ours_seconds": round(a, 4), "transformers_seconds": round(b, 4), "ratio": round(b / a, 3)}


def construction(name: str) -> dict[str, float]:
    """How long both take to construct the model on the meta device. Raises SystemExit where they differ."""
    spec = Spec.load(name)
    _, written = expressing(spec)
    config = transformers.AutoConfig.for_model(**{k: v for k, v in written.items() if k != "architectures"})

    def theirs() -> Any:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)

    counted = sum(parameter.numel() for parameter in theirs().parameters())
    if counted != cf.cost(spec).total:
        raise SystemExit(f"{name}: {cf.cost(spec).total:,} parameters, of transformers {counted:,}")
    return race(lambda: cf.build(name, device="meta"), theirs)


def main() -> None:
    logging.disable(logging.WARNING)
    models: dict[str, Any] = {}
    for name in shipped():
        counts = cf.cost(name).to_dict()
        flops: Any = counts["flops_per_token"]
        models[name] = {
            "parameters": counts["parameters"],
            "buffers": counts["buffers"],
            "cache_bytes_per_token": counts["cache_bytes_per_token"],
            "flops_per_token": flops,
            "meta_construction": construction(name),
        }
        told, took = models[name]["parameters"], models[name]["meta_construction"]
        active = " / ".join(f"{count:,}" for count in told["active"].values())
        print(
            f"{name}: {told['total']:,} parameters, predictor {told['predictor']:,}; active {active}; "
            f"cache {counts['cache_bytes_per_token']:,} B/token; {flops['training'] / 1e9:.6g} GFLOPs/token in "
            f"training, {flops['training_with_predictor'] / 1e9:.6g} with the predictor; meta "
            f"{took['ours_seconds']:.3f} s, transformers {took['transformers_seconds']:.3f} s, ratio {took['ratio']}"
        )
    figures = {
        "models": models,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "composeformer": cf.__version__,
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
