"""A workdir with all files that the report reads, and checks of the HTML and SVG of a page."""

from html.parser import HTMLParser
import json
import math
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import numpy as np

HOSTILE = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m \ud800 </pre></svg>"


def make_run(folder: pathlib.Path, *, steps: int = 1000, every: int = 5) -> pathlib.Path:
    """A workdir in the real format, with a restart, skipped steps, a NaN and hostile text."""
    rng, run = np.random.default_rng(0), folder / "quickstart"
    lines = []
    for step in range(every, steps + 1, every):
        lines.append(
            {
                "step": step,
                "loss": 2.1 + 6.2 * math.exp(-step / 120) + 0.06 * rng.standard_normal() if step != 505 else math.nan,
                "batch_digest": int(rng.integers(2**32)),
                "total_targets": step * 2040,
                "tokens_per_second": 15200 + 300 * rng.standard_normal() - (6000 if step in (every, 405) else 0),
                "step_seconds": 0.134,
                "data_wait_seconds": 0.0002 + 0.0001 * rng.random(),
                "learning_rate": 1e-3 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
                "grad_norm": 0.8 + 3 * math.exp(-step / 60) + 0.1 * rng.random() + (9 if step == 700 else 0),
                "skipped_steps": 3 if step > 500 else 0,
                "mfu": None,
            }
        )
    put(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for step, loss in ((250, 2.95), (500, 2.41), (750, 2.27), (1000, 2.2345678)):
        total = scores(loss, tokens=124_000, documents=87)
        body = {"step": step, "parameters": "EMA of the parameters", "fingerprint": "ab12", "split": "validation"}
        put(
            run / f"eval/{step}/validation.json", {**body, "total": total, "sources": {"stdlib": total, "notes": total}}
        )
    put(
        run / "eval/1000/test.json",
        {"step": 1000, "split": "test", "total": scores(2.3), "sources": {"a": scores(2.3)}},
    )
    samples = [("def main(", "):\n    print('hi')\n    if x < 3 & y:\n        return None\n"), ("class ", HOSTILE)]
    records = [{"step": 1000, "prompt": p, "text": t, "seed": 0, "temperature": 0.8, "top_p": 0.95} for p, t in samples]
    put(run / "samples.json", records)
    put(
        run / "run.json",
        {
            "run_id": "5f0c9a1b77de",
            "started": 1_790_000_000.0,
            "restarts": [{"step": 400, "time": 1_790_000_400.0}],
            "device": "cpu",
            "num_devices": 1,
            "processes": 1,
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "backend": "jit",
            "versions": {"llmjax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
            "parameters": 3_412_736,
            "parameters_by_part": {"embedding": 524_288, "blocks": 2_888_320, "norm": 128},
            "optimizer": "adamw",
            "eval_params": "EMA of the parameters",
            "unsharded_params": ["blocks.up ('layers', 'embed', 'mlp') (4, 128, 511): 1,046,528 bytes stay unsharded"],
        },
    )
    config = {
        "seed": 0,
        "data": {"store": "", "packing": "best_fit", "seq_len": 256},
        "train": {"steps": steps, "global_batch": 8},
    }
    put(run / "config.json", config)
    put(run / "store/manifest.json", manifest())
    source = {"documents": 1234, "tokens": 10_481_661, "text_bytes": 9_876_543, "rows": 40_960, "density": 0.99961}
    put(run / "data.json", {"stdlib": {**source, "samples": 8000, "epochs": 0.195312}, "notes": source})
    return run


def scores(loss: float, tokens: int = 100, documents: int = 3) -> dict:
    rest = {"nats": loss * tokens, "num_targets": tokens, "text_bytes": 4 * tokens, "documents": documents}
    bits = loss / math.log(2) / 4
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits, "accuracy": 0.5432, **rest}


def manifest() -> dict:
    split = {"documents": 1234, "tokens": 2_345_678, "text_bytes": 9_876_543, "fingerprint": "cd34"}
    source = {"path": "stdlib:", "train": split, "validation": split, "test": {**split, "documents": 0, "tokens": 0}}
    return {
        "version": 1,
        "fingerprint": "0123456789abcdef" * 4,
        "tokenizer": {"sha256": "ef" * 32, "vocab_size": 4096, "kind": "sentencepiece", "lossless": True},
        "sources": {"stdlib": source, "notes": source},
        "python": "3.11.9",
        "corpus_sha256": "fedcba9876543210" * 4,
        "compressors": {
            "gzip -9": {"concatenated": 124_000, "per_document": 136_000},
            "xz -9": {"concatenated": 99_200, "per_document": 135_160},
        },
    }


def put(path: pathlib.Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


class PageParser(HTMLParser):
    """Elements in order and the text outside of style. Asserts that each element is closed by its own tag."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += f"{data} "


def check_svgs(text: str) -> int:
    """Assert that all SVGs are well-formed; return their number."""
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
        numbers = [value for item in root.iter() for value in item.attrib.values() if re.fullmatch(r"-?[\d.]+", value)]
        assert numbers and "nan" not in " ".join(numbers)
    return len(svgs)


def put_task(
    run: pathlib.Path, step: int, task: str, main: str, lines: list[dict], value: float | None = None, **more: object
) -> None:
    """The two files of a task. The main score is `value`, by default the mean of that field of the lines."""
    if value is None:
        value = sum(line[main] for line in lines) / len(lines)
    metrics = {main: {"value": value, "low": value - 0.1, "high": value + 0.1}}
    put(
        run / f"eval/{step}/{task}.json",
        {"task": task, "step": step, "n": len(lines), "main": main, "metrics": metrics, "settings": {}, **more},
    )
    put(run / f"eval/{step}/{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def answer_lines(right: str, *, prompt: str = "question") -> list[dict]:
    """One example for each character: "1" is answered right, "0" wrong."""
    return [
        {
            "index": index,
            "input": f"{prompt} {index} <b>",
            "target": "yes",
            "prediction": "yes" if each == "1" else "no",
            "acc": float(each),
        }
        for index, each in enumerate(right)
    ]
