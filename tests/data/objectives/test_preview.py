"""The preview: what a model will see, in decoded pieces, aligned, for every objective."""

from pathlib import Path

import numpy as np
import pytest

from llmjax.cli import main
from llmjax.data.batches.packing import fill_rows, open_packing
from llmjax.data.batches.rng import CounterRng
from llmjax.data.config import ObjectiveConfig
from llmjax.data.objectives import preview
from llmjax.data.objectives.objective import open_objective
from llmjax.data.store.tokenizer import Bytes
from tests import jobs
from tests.data.stores import write_store

GOLDEN = {
    "causal": """\
sample 5: 2 chunks, 27 of 40 positions, 27 scored
  chunk 1
    inputs   <s> T o · b e , · o r · n o t · t o · b e  \\n
    targets  T   o · b e , · o r · n o t · t o · b e \\n </s>
  chunk 2
    inputs   <s> c a f      <0xC3> <0xA9>
    targets  c   a f <0xC3> <0xA9> </s>
""",
    "prefix": """\
sample 5: 2 chunks, 27 of 40 positions, 6 scored
  chunk 1
    inputs   <s> T   o   ·   b   e   ,   ·   o   r   ·   n   o   t   ·   t   o   ·   b
    targets  (T) (o) (·) (b) (e) (,) (·) (o) (r) (·) (n) (o) (t) (·) (t) (o) (·) (b) (e)
    prefix   ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==  ==

    inputs   e    \\n
    targets  (\\n) </s>
    prefix   ==   ==
  chunk 2
    inputs   <s> c  a f      <0xC3> <0xA9>
    targets  (c) a  f <0xC3> <0xA9> </s>
    prefix   ==  ==
""",
    "masked": """\
sample 5: 2 chunks, 27 of 40 positions, 4 scored
  chunk 1
    inputs   <s>   T   o   ·   [MASK] e   ,   ·   o   r   ·   n   o   t   ·   t   [MASK]
    targets  (<s>) (T) (o) (·) b      (e) (,) (·) (o) (r) (·) (n) (o) (t) (·) (t) o

    inputs   ·   b   [MASK] \\n
    targets  (·) (b) e      (\\n)
  chunk 2
    inputs   <s>   c   [MASK] f   <0xC3>   <0xA9>
    targets  (<s>) (c) a      (f) (<0xC3>) (<0xA9>)
""",
    "fim": """\
sample 5: 2 chunks, 30 of 40 positions, 30 scored
  chunk 1
    inputs   <s> T o · b e , · o r · n o t · t o · b e  \\n
    targets  T   o · b e , · o r · n o t · t o · b e \\n </s>
  chunk 2
    inputs   <s>            <|fim_prefix|> <|fim_suffix|> <|fim_middle|> c a f
    targets  <|fim_prefix|> <|fim_suffix|> <|fim_middle|> c              a f <0xC3>

    inputs   <0xC3> <0xA9>
    targets  <0xA9> </s>
""",
    "span": """\
sample 5: 2 chunks, 22 of 40 source positions, 13 of 24 positions, 13 scored
  chunk 1
    source  T o · b e <extra_id_0> · n o t · <extra_id_1> · b e \\n </s>
    inputs   <s>          <extra_id_0> , · o r            <extra_id_1> t o
    targets  <extra_id_0> ,            · o r <extra_id_1> t            o </s>
  chunk 2
    source  c a f <0xC3> <extra_id_0>
    inputs   <s>          <extra_id_0> <0xA9> </s>
    targets  <extra_id_0> <0xA9>       </s>   </s>
""",
    "ul2": """\
sample 5: 2 chunks, 20 of 40 source positions, 15 of 32 positions, 15 scored
  chunk 1
    source  [X] T o · b e , · o r · <extra_id_0> </s>
    inputs   <s>          <extra_id_0> n o t · t o · b e  \\n
    targets  <extra_id_0> n            o t · t o · b e \\n </s>
  chunk 2
    source  [R] c a f <0xC3> <extra_id_0> </s>
    inputs   <s>          <extra_id_0> <0xA9>
    targets  <extra_id_0> <0xA9>       </s>
""",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_tiny_store(tmp_path, name):
    tokenizer = Bytes()
    documents = [
        np.append(ids, tokenizer.eos_id) for ids in tokenizer.encode_batch(["To be, or not to be\n", "caf\u00e9"])
    ]
    store = write_store(tmp_path / "s", documents, bos_id=tokenizer.bos_id, vocab_size=tokenizer.vocab_size)
    config = ObjectiveConfig(name=name, rate=0.3 if name in ("masked", "span") else None)
    start = -1 if name in ("span", "ul2") else None
    objective = open_objective(config, tokenizer, seq_len=40, start_id=start)
    plan = open_packing(store, 40, "best_fit", tmp_path / "plans", objective.row_budget)
    rows = fill_rows(store, plan.chunks(np.arange(1)), 1, objective.row_budget.capacity)
    batch = objective.build_batch(rows, np.array([5]), CounterRng(1))
    assert "\n".join(preview.format_batch(batch, objective, tokenizer, width=90)) + "\n" == GOLDEN[name]


def test_prepare_prints_the_first_samples(tmp_path, capsys):
    corpus = jobs.write_corpus(tmp_path / "corpus", documents=12)
    settings = {"objective__name": "fim", "train__global_batch": 16}
    arguments = jobs.command("prepare", tmp_path / "run", corpus, **settings)[1:]
    assert main.run([*arguments, "--preview=3"]) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("sample ")] == [
        "sample 0",
        "sample 1",
        "sample 2",
    ]
    assert "<|fim_middle|>" in printed and preview.LEGEND in printed
    assert "preview" not in printed.splitlines()[-1] and "--config.objective.name=fim" in printed.splitlines()[-1]
    plans = list((Path(tmp_path) / "run" / "store" / "plans").iterdir())
    assert len(plans) == 1  # for the objective alone


def test_wide_characters_are_aligned():
    lines = list(preview._align({"inputs": ["\u4e2d\u6587", "a"], "targets": ["b", "c"]}, 100))
    assert lines == ["    inputs   \u4e2d\u6587 a", "    targets  b    c"]
