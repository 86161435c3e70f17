#!/usr/bin/env python3
"""Compare the answers and the speed of llmjax with those of lm-eval's `hf` backend, on the same requests and one model.

    llmjax import --from=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
    llmjax export --workdir=runs/smollm2 --to=exports/smollm2
    python tools/compare_lm_eval.py --workdir=runs/smollm2 --exported=exports/smollm2

Both compute in float32 on CPU, one after the other. The requests are made of public texts (docs/testdata.md): answers
to questions of PIQA, paragraphs of WikiText-2, and problems of GSM8K, whose solutions are generated. The tool needs the
extras `eval` and `parity`. For the speed both answer the requests of one kind again, when all programs are compiled,
in turns, so that other work on the machine slows both.
"""

import argparse
from collections.abc import Sequence
import gzip
import itertools
import json
import os
from pathlib import Path
import statistics
import time
from typing import Any

from etils import epath
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
import numpy as np
import torch  # pyright: ignore[reportMissingImports]  (the extra `bench`)

from llmjax.cli.logs import configure_logging
from llmjax.evals.lm_eval_tasks import Adapter
from llmjax.evals.requests import LanguageModel
from llmjax.run import loading

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 16
LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling")
TIMED = "loglikelihood"


def main() -> None:
    options = parse_options()
    configure_logging("stderr")
    requests = read_requests(options.data, options.requests, options.texts)
    overrides = [("model.dtype", "float32"), ("data.seq_len", str(options.max_length))]
    workdir = epath.Path(options.workdir)
    loading.initialize(workdir, overrides)
    with loading.load(workdir, overrides=overrides) as loaded:
        model = LanguageModel(loaded, options.batch)
        adapter = Adapter(None, model)
        make_peer: Any = HFLM  # its parameters are hidden from type checkers
        peer = make_peer(
            pretrained=options.exported,
            device="cpu",
            dtype="float32",
            batch_size=options.batch,
            max_length=options.max_length,
            prefix_token_id=model.prefix_id,
        )
        print(f"{options.exported}, float32, {options.batch} rows at a time, {options.max_length} tokens at most")
        for kind, instances in requests.items():
            if not instances:
                continue
            ours, expected = (getattr(which, kind)(instances) for which in (adapter, peer))
            show(f"{len(instances)} {kind}: {describe_difference(ours, expected)}")
            if kind == TIMED:
                for line in compare_speed({"llmjax": adapter, "hf": peer}, instances, options.rounds):
                    show(line)
            if kind in LIKELIHOODS:
                # Its sum over the vocabulary in float32 alone is off by 1e-5 a token.
                peer.softmax_dtype = torch.float64
                show(f"  hf with a float64 softmax: {describe_difference(ours, getattr(peer, kind)(instances))}")
                peer.softmax_dtype = None
            else:
                texts = zip(instances, ours, expected, strict=True)
                for number, (instance, text, other) in enumerate(texts):
                    if text != other:
                        show(f"  text {number}: {describe_tie(model, instance.args[0], text, other)}")


def show(line: str) -> None:
    """At once: the next answers may take minutes."""
    print(line, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("LLMJAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--workdir", required=True, help="an imported model")
    parser.add_argument("--exported", required=True, help="the same model, as llmjax export writes it")
    parser.add_argument("--data", type=Path, default=data, help="the public texts (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="of each kind of likelihood (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=100, help="generated texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison of speed (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows at a time (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=128, help="tokens that are read (default: %(default)s)")
    return parser.parse_args()


def read_requests(folder: Path, count: int, texts: int) -> dict[str, list[Instance]]:
    """Requests by kind; most rolling texts are parts of a paragraph, and every tenth is too long for a window."""

    def make(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
        return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]  # type: ignore

    with gzip.open(folder / "piqa" / "valid.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in itertools.islice(file, count // 2)]
    pairs = [(f"Question: {r['goal']}\nAnswer:", f" {r[field]}") for r in records for field in ("sol1", "sol2")]
    with gzip.open(folder / "wikitext2" / "test.txt.gz", "rt") as file:
        paragraphs = [line.strip() for line in file if len(line) > 300]
    parts = [paragraph[: 800 if number % 10 == 0 else 300] for number, paragraph in enumerate(paragraphs[:count])]
    rolling = [(text,) for text in parts]
    with gzip.open(folder / "gsm8k" / "test.jsonl.gz", "rt") as file:
        questions = [json.loads(line)["question"] for line in itertools.islice(file, texts)]
    until = {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    generate = [(f"Question: {question}\nAnswer:", until) for question in questions]
    return {
        "loglikelihood": make("loglikelihood", pairs),
        "loglikelihood_rolling": make("loglikelihood_rolling", rolling),
        "generate_until": make("generate_until", generate),
    }


def compare_speed(models: dict[str, Any], requests: list[Instance], rounds: int) -> list[str]:
    """Lines with the requests a second of each of two models, which answer all requests in turns; medians of rounds."""
    clocks = {"processor": time.process_time, "wall": time.perf_counter}
    seconds: dict[tuple[str, str], list[float]] = {(clock, name): [] for clock in clocks for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            began = {clock: read() for clock, read in clocks.items()}
            getattr(model, TIMED)(requests)
            for clock, read in clocks.items():
                seconds[clock, name].append(read() - began[clock])
    lines = []
    for clock in clocks:
        rates = {name: len(requests) / statistics.median(seconds[clock, name]) for name in models}
        first, second = rates.values()
        text = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        each = "; ".join(f"{name} {' '.join(f'{s:.1f}' for s in seconds[clock, name])}" for name in models)
        lines.append(f"{TIMED} requests a second of {clock} time: {text}, ratio {first / second:.2f} (seconds: {each})")
    return lines


def describe_difference(ours: list, expected: list) -> str:
    """How the answers of one kind differ."""
    if isinstance(ours[0], str):
        return f"{sum(a == b for a, b in zip(ours, expected, strict=True))} texts are equal"
    first, second = ([a[0] if isinstance(a, tuple) else a for a in answers] for answers in (ours, expected))
    difference = f"they differ by at most {np.abs(np.subtract(first, second)).max():.1e} nats"
    if isinstance(ours[0], tuple):
        return (
            f"{difference}, {sum(a[1] != b[1] for a, b in zip(ours, expected, strict=True))} in whether they are greedy"
        )
    return difference


def describe_tie(model: LanguageModel, prompt: str, text: str, other: str) -> str:
    """By how many nats the tokens differ in likelihood where two texts part."""
    ids, other_ids = (model.encode_prompt(prompt + new) for new in (text, other))
    pairs = itertools.zip_longest(ids, other_ids)
    at = next(position for position, (a, b) in enumerate(pairs) if a != b)
    end = [model.tokenizer.eos_id]
    scores = model.loglikelihoods([(ids[:at], (which[at : at + 1] or end)) for which in (ids, other_ids)])
    return f"token {at} differs, by {abs(scores[0][0] - scores[1][0]):.1e} nats"


if __name__ == "__main__":
    main()
