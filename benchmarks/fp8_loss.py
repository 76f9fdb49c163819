"""Does FP8 cost quality: a small DeepSeek-V3 trained on real text under several recipes, from the same start.

The figure to meet is the paper's: fp8-block within 0.25% of the loss of bf16 (arXiv 2412.19437, section 3.3 and
appendix B.1). All recipes of one seed go on from the same weights and moments, after a first part in bf16, with the
same batches in the same order, so that most of the noise is theirs in common. What is left, two trajectories drifting
apart, is measured by `bf16 again`: bf16 from weights that differ by one part in a million. From initial weights that
alone was 2% after 250 to 500 steps of so small a model (with one layer more), since the time at which it leaves its
first plateau hangs on anything; so the comparison begins behind that.

Beside them one scale per tensor, and a recipe that is broken on purpose as a real one was: the scales of weights, which
are any numbers, read by a kernel that knows powers of two only (sglang issue 39193). Every quantised dimension is at
least 384.

The text is the source of Python's own standard library, as bytes. The loss compared is the mean of the last fifth of
the steps; the plot shows means of 25 steps.

    python benchmarks/fp8_loss.py [--steps N] [--seeds 0 1 2] [--threads N] [--result FILE]

Each run is kept in benchmarks/results/fp8_loss.json as it ends, and not made again while its settings are the same;
table and plot (fp8_loss.svg) are made of what is there. `--merge FILE...` takes the runs of other results in.
"""

import argparse
import copy
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import attrs
import torch
from plots import lines_svg

import composeformer as cf
from composeformer.decoder import Model
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trainer

RESULT = Path(__file__).parent / "results" / "fp8_loss.json"
ROWS, LENGTH, RATE, CLIP, FIRST = 4, 256, 5e-4, 1.0, 350
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
    "layers": [{"ffn": "dense"}, {"ffn": "experts"}],
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
    """Weights are multiplied by the powers of two in their scales, as if the rest of these were not there."""
    from composeformer_fp8.fast import Fast
    from composeformer_fp8.quantise import dequantise, quantise

    whole = Fast.matrix

    def cut(self: Any, held: Any) -> torch.Tensor:
        recipe = self.recipe
        codes, scales = quantise(held[0], recipe.block, recipe.weights, recipe.scales)
        return dequantise(codes, torch.exp2(scales.log2().floor()), recipe.block)

    Fast.matrix = cut  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fast.matrix = whole  # type: ignore[method-assign]


def text() -> torch.Tensor:
    library = Path(sysconfig.get_paths()["stdlib"])
    learnt = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return torch.frombuffer(bytearray(learnt), dtype=torch.uint8)


@attrs.frozen
class Start:
    """Where the recipes of one seed begin: weights, and the state of each parameter's moments."""

    weights: dict[str, torch.Tensor]
    moments: dict[int, Any]
    losses: list[float]


def first_part(seed: int, data: torch.Tensor) -> Start:
    """The same beginning for all recipes, in bf16."""
    model = cf.build(spec_of("bf16"), seed=seed)
    objective, optimizer = trainer(model)
    order = torch.Generator().manual_seed(1000 + seed)
    losses = learn(
        model, objective, optimizer, data, order, FIRST, lambda step: min(1, (step + 1) / 50), "first part"
    )
    return Start(copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"]), losses)


def train(recipe: str, seed: int, steps: int, start: Start, data: torch.Tensor) -> dict[str, Any]:
    """One run: the loss of every step."""
    began = perf_counter()
    model = cf.build(spec_of(recipe), seed=seed)
    model.load_state_dict(start.weights)
    if recipe == "bf16 again":
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=noise))
    objective, optimizer = trainer(model)
    # Every policy has the same parameters in the same order, whatever its moments are kept in.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(start.moments)})
    order = torch.Generator().manual_seed(2000 + seed)
    with broken_scales() if recipe == "broken scales" else nullcontext():
        name = f"{recipe}, seed {seed}"
        losses = learn(model, objective, optimizer, data, order, steps, lambda step: 1 - step / steps, name)
    return {"recipe": recipe, "seed": seed, "seconds": round(perf_counter() - began), "losses": losses}


def spec_of(recipe: str) -> Spec:
    return Spec.from_dict({**SPEC, "precision": RECIPES[recipe]})


def learn(
    model: Model,
    objective: Any,
    optimizer: torch.optim.Optimizer,
    data: torch.Tensor,
    order: torch.Generator,
    steps: int,
    rate: Callable[[int], float],
    name: str,
) -> list[float]:
    """Trains for `steps`, with the learning rate times `rate(step)`."""
    losses, started = [], perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step)
        starts = torch.randint(0, len(data) - LENGTH, (ROWS,), generator=order).tolist()
        ids = torch.stack([data[start : start + LENGTH] for start in starts]).long()
        told = train_step(model, [TokenBatch(ids)], objective, optimizer, step=step, clip_norm=CLIP)
        assert told.skipped is None, told.skipped
        losses.append(round(told.loss, 5))
        if step % 50 == 49:
            print(
                f"{name}, step {step + 1}: {fmean(losses[-25:]):.4f}, {perf_counter() - started:.0f} s",
                flush=True,
            )
    return losses


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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--merge", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared, runs = settings(arguments.steps), []
    for path in (arguments.result, *arguments.merge):
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        runs += found["runs"] if found.get("settings") == shared else []
    data = text()
    for seed in arguments.seeds:
        known = {run["recipe"] for run in runs if run["seed"] == seed}
        missing = [recipe for recipe in arguments.recipes if recipe not in known]
        start = first_part(seed, data) if missing else None
        for recipe in missing:
            assert start is not None
            runs.append(train(recipe, seed, arguments.steps, start, data))
            write(runs, shared, arguments.result)
    write(runs, shared, arguments.result)
    for row in table(runs, arguments.steps):
        print(row)


def write(runs: list[dict[str, Any]], shared: dict[str, Any], result: Path) -> None:
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
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    result.with_suffix(".svg").write_text(plot(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
