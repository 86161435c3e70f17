"""Log-likelihoods of texts by llama.cpp on exported GGUF files, beside llmjax on the same files.

    llmjax import --from=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/chat
    python tools/compare_llama_cpp.py --workdir=runs/chat --texts=texts.jsonl      # records with the field `text`

Each row of the table is one format of `llmjax export --format=gguf`: the mean log-likelihood of a token in nats under
llmjax, which computes in float32 on the dequantised weights, and under llama.cpp, which also rounds activations to 8
bits where weights are quantised; then the mean over the texts of the difference a token, and of its size. Both read the
same token ids.

Needs the package llama-cpp-python, which pip compiles from source (about 20 minutes on two cores).
"""

import argparse
import json
from pathlib import Path
import tempfile

from etils import epath
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from llmjax.evals.requests import LanguageModel
from llmjax.interop import exporting, importing
from llmjax.run import loading

FORMATS = ("f32", "f16", "q8_0")
HEAD = (
    "| format | texts | tokens | llmjax | llama.cpp | mean difference | mean absolute difference |",
    "|---" * 7 + "|",
)


def score_by_llmjax(file: Path, texts: list[str], max_tokens: int) -> tuple[list[list[int]], np.ndarray]:
    """(token ids of each text after the prefix id, log-likelihood of each text in nats), in float32."""
    workdir = epath.Path(file.with_suffix(""))
    importing.import_checkpoint(file, workdir, overrides=[("model.dtype", "float32")])
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
            ids, ours = score_by_llmjax(file, texts, flags.max_tokens)
            theirs = score_by_llama_cpp(file, ids)
            counts = np.array([len(of_text) - 1 for of_text in ids])
            means = ours.sum() / counts.sum(), theirs.sum() / counts.sum()
            differences = (theirs - ours) / counts
            print(
                f"| {dtype} | {len(texts)} | {counts.sum():,} | {means[0]:.5f} | {means[1]:.5f} | "
                f"{differences.mean():+.5f} | {np.abs(differences).mean():.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
