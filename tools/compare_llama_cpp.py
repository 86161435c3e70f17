"""Log-likelihoods and greedy texts by llama.cpp on exported GGUF files, beside llmjax on the same files.

    llmjax import --from=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/chat
    python tools/compare_llama_cpp.py --workdir=runs/chat --texts=texts.jsonl      # records with the field `text`

Each row of the table is one format of `llmjax export --format=gguf`: the mean log-likelihood of a token in nats under
llmjax, which computes in float32 on the dequantised weights, and under llama.cpp, which also rounds activations to 8
bits where weights are quantised; then the mean over the texts of the difference a token, and of its size. Both read the
same token ids. The last line is of the f32 file: of how many prompts, the first words of the texts, both have the same
token ids, and how many both continue by the same text, always with the most likely token.

Needs the package llama-cpp-python, which pip compiles from source (about 20 minutes on two cores).
"""

import argparse
import json
from pathlib import Path
import tempfile
from typing import Any

from etils import epath
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from llmjax.evals.requests import LanguageModel
from llmjax.interop import exporting, importing
from llmjax.run import loading

FORMATS = ("f32", "f16", "q8_0")
NUM_PROMPTS, PROMPT_WORDS, NEW_TOKENS = 20, 12, 40
HEAD = (
    "| format | texts | tokens | llmjax | llama.cpp | mean difference | mean absolute difference |",
    "|---" * 7 + "|",
)


def import_file(file: Path) -> epath.Path:
    """A new run with the file's parameters, which computes in float32."""
    workdir = epath.Path(file.with_suffix(""))
    importing.import_checkpoint(file, workdir, overrides=[("model.dtype", "float32")])
    return workdir


def score_by_llmjax(workdir: epath.Path, texts: list[str], max_tokens: int) -> tuple[list[list[int]], np.ndarray]:
    """(token ids of each text after the prefix id, log-likelihood of each text in nats)."""
    with loading.load(workdir) as loaded:
        model = LanguageModel(loaded, batch=1)
        ids = [model.encode(text)[:max_tokens] for text in texts]
        return [[model.prefix_id, *of_text] for of_text in ids], np.array(model.rolling(ids))


def score_by_llama_cpp(file: Path, ids: list[list[int]]) -> np.ndarray:
    """The log-likelihood of each text in nats, from the logits of llama.cpp."""
    model = llama_cpp.Llama(str(file), n_ctx=max(map(len, ids)), logits_all=True, verbose=False)
    sums = []
    for of_text in ids:
        model.reset()
        model.eval(of_text)
        logits = model.scores[: len(of_text) - 1].astype(np.float64)
        normalizer = np.logaddexp.reduce(logits, axis=-1)
        sums.append(np.sum(logits[np.arange(len(logits)), of_text[1:]] - normalizer))
    return np.array(sums)


def compare_greedy(workdir: epath.Path, file: Path, prompts: list[str]) -> tuple[int, int]:
    """(prompts with the same ids, prompts that both continue by the same ids of NEW_TOKENS)."""
    theirs = llama_cpp.Llama(str(file), n_ctx=512, verbose=False)
    same_ids, same_text = 0, 0
    with loading.load(workdir) as loaded:
        model = LanguageModel(loaded, batch=1)
        ids = [model.encode_prompt(prompt) for prompt in prompts]
        texts = model.generate(ids, max_tokens=NEW_TOKENS)
    for prompt, of_prompt, text in zip(prompts, ids, texts, strict=True):
        same_ids += theirs.tokenize(prompt.encode(), special=True) == of_prompt
        answer: Any = theirs.create_completion(of_prompt, max_tokens=NEW_TOKENS, temperature=0.0)
        same_text += answer["choices"][0]["text"] == text
    return same_ids, same_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run that `llmjax export --format=gguf` can write")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with the field `text`")
    parser.add_argument("--count", type=int, default=50, help="texts that are read (default 50)")
    parser.add_argument("--max_tokens", type=int, default=200, help="of a text (default 200)")
    flags = parser.parse_args()
    lines = flags.texts.read_text().splitlines()[: flags.count]
    texts = [json.loads(line)["text"] for line in lines]
    print("\n".join(HEAD))
    with tempfile.TemporaryDirectory() as folder:
        for dtype in FORMATS:
            file = Path(folder) / f"{dtype}.gguf"
            exporting.export(epath.Path(flags.workdir), file, dtype=dtype)
            workdir = import_file(file)
            ids, ours = score_by_llmjax(workdir, texts, flags.max_tokens)
            theirs = score_by_llama_cpp(file, ids)
            counts = np.array([len(of_text) - 1 for of_text in ids])
            means = ours.sum() / counts.sum(), theirs.sum() / counts.sum()
            differences = (theirs - ours) / counts
            print(
                f"| {dtype} | {len(texts)} | {counts.sum():,} | {means[0]:.5f} | {means[1]:.5f} | "
                f"{differences.mean():+.5f} | {np.abs(differences).mean():.5f} |",
                flush=True,
            )
        prompts = [" ".join(text.split()[:PROMPT_WORDS]) for text in texts[:NUM_PROMPTS]]
        file = Path(folder) / "f32.gguf"
        same_ids, same_text = compare_greedy(epath.Path(file.with_suffix("")), file, prompts)
        print(f"of {len(prompts)} prompts {same_ids} have the same token ids, and {same_text} the same greedy text")


if __name__ == "__main__":
    main()
