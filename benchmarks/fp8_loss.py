"""Does FP8 cost quality: a small DeepSeek-V3 trained on real text under several recipes, from the same start.

The figure to meet is the paper's: fp8-block within 0.25% of the loss of bf16 (arXiv 2412.19437, section 3.3 and
appendix B.1). Runs of one seed have the same initial weights and the same batches in the same order, so that most
of the noise is theirs in common; what is left, two trajectories drifting apart, is measured by `bf16 again`: bf16
from initial weights that differ by one part in a million. Beside them one scale per tensor, and a recipe that is
broken on purpose as a real one was: scales stored as powers of two that were no powers of two, cut off (sglang issue
39193). Every quantised dimension is at least 384.

The text is the source of Python's own standard library, as bytes. The loss compared is the mean of the last fifth of
the steps; the plot shows means of 25 steps.

    python benchmarks/fp8_loss.py [--steps N] [--seeds 0 1 2] [--threads N]

Each run is kept in benchmarks/results/fp8_loss.json as it ends, and not made again while its settings are the same;
table and plot (fp8_loss.svg) are made of what is there.
"""

import argparse
import json
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from plots import lines_svg

import composeformer as cf
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trainer

RESULTS = Path(__file__).parent / "results"
RESULT, PLOT = RESULTS / "fp8_loss.json", RESULTS / "fp8_loss.svg"
ROWS, LENGTH, RATE, CLIP = 4, 256, 2e-3, 1.0
LIMIT = 0.0025
SPEC: dict[str, Any] = {
    "name": "small-deepseek-v3",
    "model": {"vocab_size": 256, "hidden_size": 384, "max_position_embeddings": 512},
    "norm": {"kind": "rmsnorm"},
    "position": {"kind": "rope"},
    "mixer": {
        "kind": "mla",
        "num_heads": 4,
        "q_lora_rank": 384,
        "kv_lora_rank": 384,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 96,
    },
    "ffn": {
        "dense": {"kind": "swiglu", "intermediate_size": 1024},
        "experts": {
            "kind": "moe",
            "num_experts": 8,
            "num_shared_experts": 1,
            "intermediate_size": 384,
            "router": {"kind": "sigmoid-bias", "top_k": 2, "sequence_balance_alpha": 0.0001},
        },
    },
    "layers": [{"ffn": "dense"}, {"ffn": "experts", "repeat": 2}],
}
RECIPES: dict[str, dict[str, Any]] = {
    "bf16": {"kind": "bf16"},
    "bf16 again": {"kind": "bf16"},
    "fp8-block": {"kind": "fp8-block"},
    "fp8-tensor": {"kind": "fp8-tensor"},
    "broken scales": {"kind": "fp8-block"},
}


@contextmanager
def broken_scales() -> Iterator[None]:
    """Scales are used as if their exponents were all there is of them."""
    from composeformer_fp8 import quantise

    whole = quantise.scales_of

    def cut(amax: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.exp2(whole(amax, *args, **kwargs).log2().floor())

    quantise.scales_of = cut  # type: ignore[assignment]
    try:
        yield
    finally:
        quantise.scales_of = whole


def text() -> torch.Tensor:
    library = Path(sysconfig.get_paths()["stdlib"])
    learnt = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return torch.frombuffer(bytearray(learnt), dtype=torch.uint8)


def train(recipe: str, seed: int, steps: int, data: torch.Tensor) -> dict[str, Any]:
    """One run: the loss of every step."""
    spec = Spec.from_dict({**SPEC, "precision": RECIPES[recipe]})
    model = cf.build(spec, seed=seed)
    if recipe == "bf16 again":
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=noise))
    objective, optimizer = trainer(model)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses, started = [], perf_counter()
    with broken_scales() if recipe == "broken scales" else nullcontext():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / 50, (steps - step) / (steps / 5))
            starts = torch.randint(0, len(data) - LENGTH, (ROWS,), generator=generator).tolist()
            ids = torch.stack([data[start : start + LENGTH] for start in starts]).long()
            told = train_step(model, [TokenBatch(ids)], objective, optimizer, step=step, clip_norm=CLIP)
            assert told.skipped is None, told.skipped
            losses.append(round(told.loss, 5))
            if step % 50 == 0 or step == steps - 1:
                mean = fmean(losses[-25:])
                print(
                    f"{recipe}, seed {seed}, step {step}: {mean:.4f}, {perf_counter() - started:.0f} s",
                    flush=True,
                )
    return {"recipe": recipe, "seed": seed, "seconds": round(perf_counter() - started), "losses": losses}


def settings(steps: int) -> dict[str, Any]:
    """What two runs must share to be compared."""
    return {
        "steps": steps,
        "rows": ROWS,
        "length": LENGTH,
        "rate": RATE,
        "clip": CLIP,
        "spec": SPEC,
        "recipes": RECIPES,
    }


def table(runs: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each recipe against bf16 of the same seed: relative differences of the mean loss of the last fifth."""
    last = steps // 5
    end = {(run["recipe"], run["seed"]): fmean(run["losses"][-last:]) for run in runs}
    rows = []
    for recipe in RECIPES:
        seeds = sorted(seed for name, seed in end if name == recipe and ("bf16", seed) in end)
        if not seeds:
            continue
        differences = [end[recipe, seed] / end["bf16", seed] - 1 for seed in seeds]
        row = {"recipe": recipe, "loss": [round(end[recipe, seed], 4) for seed in seeds], "seeds": seeds}
        if recipe != "bf16":
            row["relative"] = [round(each, 6) for each in differences]
            row["mean"] = round(fmean(differences), 6)
            row["spread"] = round(stdev(differences), 6) if len(seeds) > 1 else None
            row["within 0.25%"] = all(abs(each) < LIMIT for each in differences)
        rows.append(row)
    return rows


def smoothed(losses: list[float], width: int = 25) -> list[tuple[float, float]]:
    """Means of `width` steps, each at its middle."""
    return [(i + width / 2, fmean(losses[i : i + width])) for i in range(0, len(losses) - width + 1, width)]


def plot(runs: list[dict[str, Any]]) -> str:
    """The relative difference of the smoothed loss to bf16, a line for each run."""
    base = {run["seed"]: smoothed(run["losses"]) for run in runs if run["recipe"] == "bf16"}
    lines = [
        (
            run["recipe"],
            [(x, 100 * (y / z - 1)) for (x, y), (_, z) in zip(smoothed(run["losses"]), base[run["seed"]])],
        )
        for run in runs
        if run["recipe"] != "bf16" and run["seed"] in base
    ]
    title = "Loss against bf16 of the same seed and batches (mean of 25 steps)"
    return lines_svg(title, "step", "relative difference, %", lines, band=100 * LIMIT, clip=2.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = settings(arguments.steps)
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    runs: list[dict[str, Any]] = found.get("runs", []) if found.get("settings") == shared else []
    data = text()
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            if all((run["recipe"], run["seed"]) != (recipe, seed) for run in runs):
                runs.append(train(recipe, seed, arguments.steps, data))
                write(runs, shared)
    write(runs, shared)
    for row in table(runs, arguments.steps):
        print(row)


def write(runs: list[dict[str, Any]], shared: dict[str, Any]) -> None:
    """All that is known so far, and the plot of it."""
    model = cf.cost(Spec.from_dict(SPEC))
    figures = {
        "table": table(runs, shared["steps"]),
        "parameters": model.total,
        "active": model.active.with_embeddings,
        "tokens in a run": shared["steps"] * ROWS * LENGTH,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": shared,
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(figures, indent=1)
    RESULT.write_text(text + "\n", encoding="utf-8")
    PLOT.write_text(plot(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
