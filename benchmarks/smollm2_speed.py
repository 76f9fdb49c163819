"""SmolLM2-135M against transformers on the same weights: prefill and greedy decoding, one process, alternating.

Equality of the answers is asserted before anything is timed. A ratio above 1 means that composeformer is faster.

    python benchmarks/smollm2_speed.py      prints the figures and writes benchmarks/results/smollm2_speed.json
"""

import json
import platform
import runpy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import composeformer as cf
from composeformer.generation import generate

HERE = Path(__file__).parent
RESULT = HERE / "results" / "smollm2_speed.json"
PARITY = runpy.run_path(str(HERE / "smollm2_parity.py"))


def race(ours: Callable[[], Any], theirs: Callable[[], Any], runs: int) -> dict[str, float]:
    """Median seconds of both, run in turn, and theirs over ours."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs + 1):
        for side, work in enumerate((ours, theirs)):
            started = perf_counter()
            work()
            times[side].append(perf_counter() - started)
    a, b = (statistics.median(side[1:]) for side in times)  # the first of each warms up
    return {"ours_seconds": round(a, 4), "transformers_seconds": round(b, 4), "ratio": round(b / a, 3)}


def main() -> None:
    path = PARITY["model_file"]()
    judge = PARITY["reference"](path)
    judge.set_attn_implementation("sdpa")
    judge.generation_config.eos_token_id = None
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cf.import_model(path, Path(folder) / "m")
        model = cf.load(Path(folder) / "m")
        generator = torch.Generator().manual_seed(0)
        for batch in (1, 8):
            prompt = torch.randint(1000, 40000, (batch, 32), generator=generator)

            def ours(prompt: torch.Tensor = prompt) -> Any:
                return [list(row.ids) for row in generate(model, prompt, max_new_tokens=32)]

            def theirs(prompt: torch.Tensor = prompt) -> Any:
                mask = torch.ones_like(prompt)
                found = judge.generate(
                    prompt, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0
                )
                return found[:, 32:].tolist()

            assert ours() == theirs(), "the answers differ; a speed would mean nothing"
            figures[f"greedy decoding, batch {batch}, 32 + 32 tokens"] = race(ours, theirs, 5)
        long = torch.randint(1000, 40000, (1, 1024), generator=generator)

        def prefill() -> Any:
            with torch.inference_mode():
                return model(long, cache=model.new_cache(1, 1024), last_only=True).logits

        def their_prefill() -> Any:
            with torch.inference_mode():
                return judge(long, logits_to_keep=1, use_cache=True).logits

        gap = (prefill() - their_prefill()).abs().max() / their_prefill().abs().max()
        assert float(gap) < 1e-5
        figures["prefill of 1024"] = race(prefill, their_prefill, 5)
    import transformers

    figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    figures["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
