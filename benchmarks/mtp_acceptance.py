"""How many drafts of a multi-token predictor are right: a small DeepSeek-V3 trained from nothing on real text.

The text is the source of Python's own standard library, as bytes; modules whose name hashes to a multiple of ten
are held out. The model is `tiny-deepseek-v3`, wider. Acceptance is measured on continuations of held-out files,
greedy and sampled, where greedy text with drafts must be that without: a difference is admitted only where the
model's two best logits lie within 1e-4 of each other, and is counted.

    python benchmarks/mtp_acceptance.py [--steps N]    writes benchmarks/results/mtp_acceptance.json
"""

import argparse
import json
import platform
import sysconfig
import zlib
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import composeformer as cf
from composeformer.decoder import Model
from composeformer.generation import Sampling, generate
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trainer

RESULT = Path(__file__).parent / "results" / "mtp_acceptance.json"
WIDER = {
    "model.hidden_size": 192,
    "model.max_position_embeddings": 1024,
    "train.learning_rate": 2e-3,
}
ROWS, LENGTH, PROMPT, NEW = 8, 256, 128, 128
NEAR = 1e-4


def texts() -> tuple[bytes, list[tuple[str, bytes]]]:
    """The bytes to learn from, and the held-out files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    learnt, held = [], []
    for path in sorted(library.glob("*.py")):
        data = path.read_bytes()
        if zlib.crc32(path.name.encode()) % 10:
            learnt.append(data)
        elif len(data) >= 4 * PROMPT:
            held.append((path.name, data))
    return b"\n".join(learnt), held


def batch(data: torch.Tensor, generator: torch.Generator) -> TokenBatch:
    starts = torch.randint(0, len(data) - LENGTH, (ROWS,), generator=generator)
    return TokenBatch(torch.stack([data[start : start + LENGTH] for start in starts.tolist()]).long())


def learn(spec: Spec, data: torch.Tensor, steps: int) -> tuple[Model, dict[str, Any]]:
    """The trained model, and how its losses and loads went."""
    model = cf.build(spec, seed=0)
    objective, optimizer = trainer(model)
    generator = torch.Generator().manual_seed(0)
    started, told = perf_counter(), {}
    for step in range(steps):
        rate = spec.train.learning_rate * min(1, (step + 1) / 50, (steps - step) / (steps / 5))
        for group in optimizer.param_groups:
            group["lr"] = rate
        result = train_step(model, [batch(data, generator)], objective, optimizer, step=step, clip_norm=1.0)
        if step % 100 == 0 or step == steps - 1:
            unbalanced = {k: round(v, 2) for k, v in result.metrics.items() if k.endswith("max_violation")}
            depth = round(result.metrics["predictor.depth_1"], 3)
            told[step] = {"loss": round(result.loss, 3), "depth_1": depth, **unbalanced}
            print(step, told[step], f"{perf_counter() - started:.0f} s", flush=True)
    return model.eval(), told


def acceptance(model: Model, prompts: list[list[int]], sampling: Sampling) -> dict[str, float]:
    made = generate(model, prompts, max_new_tokens=NEW, sampling=sampling, speculate=True)
    drafted, accepted = sum(m.drafted for m in made), sum(m.accepted for m in made)
    steps, new = sum(m.steps for m in made), sum(len(m.ids) for m in made)
    return {"acceptance": round(accepted / drafted, 4), "tokens_per_step": round(new / steps, 3)}


def differences(model: Model, prompts: list[list[int]]) -> dict[str, int]:
    """Greedy texts with and without drafts: how many differ, and how many of these at a near tie."""
    plain = generate(model, prompts, max_new_tokens=NEW)
    drafted = generate(model, prompts, max_new_tokens=NEW, speculate=True)
    differ = near = 0
    for prompt, a, b in zip(prompts, plain, drafted, strict=True):
        if a.ids == b.ids:
            continue
        differ += 1
        place = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *a.ids[:place]]]), last_only=True).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        near += best - second < NEAR * max(abs(best), 1)
    assert differ == near, f"{differ - near} texts differ where no two logits are near"
    return {"texts": len(prompts), "differ": differ, "at_a_near_tie": near}


def held_out_loss(model: Model, held: list[tuple[str, bytes]]) -> dict[str, float]:
    objective, _ = trainer(model)
    rows = torch.stack([torch.frombuffer(bytearray(data[:LENGTH]), dtype=torch.uint8) for _, data in held])
    seen = TokenBatch(rows.long())
    with torch.no_grad():
        out = model(seen.ids, predict=True)
        total, weight = objective(out, seen.seen())
        ahead = out.predictions[0]
        depth, count = objective(cf.tensors.ModelOutput(ahead.logits, ahead.hidden), ahead.batch)
    return {"loss": round(float(total / weight), 3), "depth_1": round(float(depth / count), 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    learnt, held = texts()
    spec = Spec.load("tiny-deepseek-v3").with_(WIDER)
    model, told = learn(spec, torch.frombuffer(bytearray(learnt), dtype=torch.uint8), steps)
    prompts = [list(data[len(data) // 2 : len(data) // 2 + PROMPT]) for _, data in held]
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * ROWS * LENGTH,
        "training": told,
        "held_out_files": [name for name, _ in held],
        "held_out": held_out_loss(model, held),
        "greedy": acceptance(model, prompts, Sampling()),
        "temperature 1": acceptance(model, prompts, Sampling(temperature=1.0)),
        "greedy text with and without drafts": differences(model, prompts),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
