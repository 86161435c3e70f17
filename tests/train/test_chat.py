"""Training on dialogues by real commands: interrupted, resumed, evaluated and exported."""

import json

from etils import epath
import pytest

from llmjax.data.chat_template import DEFAULT_SOURCE
from llmjax.interop import exporting, import_run
from tests import jobs

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

CHAT = {"data__sources__main__chat": "auto", "data__seq_len": 96, "model__num_layers": 1, "train__steps": 4}


@pytest.fixture
def dialogues(tmp_path):
    """Dialogues of one to four questions, beside plain text."""
    folder = tmp_path / "dialogues"
    folder.mkdir()
    lines = []
    for number in range(120):
        turns = []
        for turn in range(1 + number % 4):
            turns += [
                {"role": "user", "content": f"What is {number} + {turn}?"},
                {"role": "assistant", "content": f"It is {number + turn}."},
            ]
        lines.append(json.dumps({"messages": turns}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    jobs.write_corpus(tmp_path / "plain", 30)
    return folder


def test_an_interrupted_run_on_dialogues_equals_an_unbroken_one(dialogues, tmp_path):
    settings = CHAT | {
        "data__sources__main__path": dialogues / "a.jsonl",
        "data__sources__plain__path": f"{tmp_path}/plain/*.txt",
    }
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    printed = jobs.run(jobs.command("train", unbroken, **settings), LLMJAX_CPU_DEVICES="1")
    assert "main: dialogues: 120 as messages (role, content)" in printed
    assert "were cut at the end of an assistant turn" in printed
    assert f"next:   llmjax chat --workdir={unbroken}\n" in printed
    settings["train__compilation_cache"] = unbroken / "compilation_cache"
    for stop_at in (2, 0):
        arguments = jobs.command("train", resumed, **settings, data__store=unbroken / "store", train__stop_at=stop_at)
        jobs.run(arguments, LLMJAX_CPU_DEVICES="1")
    assert jobs.trace(resumed) == jobs.trace(unbroken)
    scores = json.loads((unbroken / "eval" / "4" / "validation.json").read_text())
    main, plain = scores["sources"]["main"], scores["sources"]["plain"]
    assert main["bits_per_byte"] is None and plain["bits_per_byte"] > 0
    assert 0 < main["num_targets"] < main["text_bytes"] and scores["total"]["bits_per_byte"] is None
    exporting.export(epath.Path(unbroken), tmp_path / "exported")
    import_run.import_run(epath.Path(unbroken), epath.Path(tmp_path / "next"))
    for folder in (tmp_path / "exported", tmp_path / "next" / "tokenizer"):
        assert (folder / "chat_template.jinja").read_text() == DEFAULT_SOURCE
