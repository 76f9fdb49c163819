"""A 48M DeepSeek-V3 against transformers on the same weights: training step, prefill, greedy decoding, alternating.

Hidden 512, 6 layers of which the first is dense, 16 experts top-4 in 4 groups, 8 heads. One process, equality
asserted before anything is timed; a ratio above 1 means that composeformer is faster. transformers computes its
experts by grouped_mm, its default, and attention by its sdpa.

    python benchmarks/deepseek_pair.py      prints the figures and writes benchmarks/results/deepseek_pair.json
"""

import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

import composeformer as cf
from composeformer.decoder import Model
from composeformer.generation import generate

RESULT = Path(__file__).parent / "results" / "deepseek_pair.json"
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
}


def race(ours: Callable[[], Any], theirs: Callable[[], Any], runs: int) -> dict[str, float]:
    """Median seconds of both, run in turn, the first changing sides, and theirs over ours."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for run in range(runs + 1):
        for side in (0, 1) if run % 2 else (1, 0):
            started = perf_counter()
            (theirs if side else ours)()
            times[side].append(perf_counter() - started)
    a, b = (statistics.median(side[1:]) for side in times.values())  # the first of each warms up
    return {"ours_seconds": round(a, 4), "transformers_seconds": round(b, 4), "ratio": round(b / a, 3)}


def pair(folder: Path) -> tuple[Model, Any]:
    """Ours and theirs, of the same random weights; the choosing biases are random too."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**SHAPE)
    config.get_text_config().pad_token_id = 0
    judge = transformers.DeepseekV3ForCausalLM(config)
    for name, buffer in judge.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.05)
    judge.save_pretrained(folder / "theirs")
    cf.import_model(folder / "theirs", folder / "ours")
    return cf.load(folder / "ours"), judge.train()


def training(model: Model, judge: Any, figures: dict[str, Any], runs: int) -> None:
    """One step of 4 x 512 tokens: forward, backward, AdamW. Both average the loss over the labels."""
    from composeformer.train import TokenBatch, train_step, trainer

    ids = torch.randint(0, SHAPE["vocab_size"], (4, 512), generator=torch.Generator().manual_seed(1))
    spec = model.spec.with_({"train.learning_rate": 1e-4})
    objective, optimizer = trainer(model, spec)
    options = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in judge.parameters():
        groups[parameter.ndim >= 2].append(parameter)
    their_optimizer = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}], **options
    )
    count = 0

    def ours() -> float:
        nonlocal count
        count += 1
        return train_step(model, [TokenBatch(ids)], objective, optimizer, step=count).loss

    def theirs() -> float:
        their_optimizer.zero_grad(set_to_none=True)
        loss = judge(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in judge.parameters() if p.grad is not None])
        their_optimizer.step()
        return float(loss)

    losses = [(ours(), theirs()) for _ in range(2)]
    assert all(abs(a - b) < 1e-4 * b for a, b in losses), losses
    figures["training step, 4 x 512 tokens"] = race(ours, theirs, runs)


def inference(model: Model, judge: Any, figures: dict[str, Any], runs: int) -> None:
    """Prefill of 2,048 tokens, and greedy decoding of 64 after 32."""
    judge.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(2)
    long = torch.randint(0, SHAPE["vocab_size"], (1, 2048), generator=generator)

    def ours() -> torch.Tensor:
        with torch.inference_mode():
            return model(long, cache=model.new_cache(1, 2048), last_only=True).logits

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            return judge(long, logits_to_keep=1, use_cache=True).logits

    gap = (ours() - theirs()).abs().max() / theirs().abs().max()
    assert float(gap) < 1e-5, float(gap)
    figures["prefill of 2048"] = race(ours, theirs, runs)
    for batch in (1, 8):
        prompt = torch.randint(0, SHAPE["vocab_size"], (batch, 32), generator=generator)

        def our_answers(prompt: torch.Tensor = prompt) -> Any:
            return [list(row.ids) for row in generate(model, prompt, max_new_tokens=64)]

        def their_answers(prompt: torch.Tensor = prompt) -> Any:
            mask = torch.ones_like(prompt)
            options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
            return judge.generate(prompt, attention_mask=mask, **options)[:, 32:].tolist()

        assert our_answers() == their_answers(), "the answers differ; a speed would mean nothing"
        figures[f"greedy decoding, batch {batch}, 32 + 64 tokens"] = race(our_answers, their_answers, runs)


def main(runs: int = 7) -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, judge = pair(Path(folder))
        figures["parameters"] = sum(p.numel() for p in model.parameters())
        inference(model.eval(), judge.eval(), figures, runs)
        training(model.train(), judge.train(), figures, runs)
    figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    figures["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
