"""Files of prompts: one line a completion, the same bytes however often the work was interrupted and in any company."""

import json
import shutil

from etils import epath
import pytest

from llmjax.cli.generate import generate as generate_command
from llmjax.errors import UserError
from llmjax.inference.generate import complete
from llmjax.inference.sampling import Sampling
from llmjax.interop import importing
from llmjax.run import loading
from tests.interop import published

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
PROMPTS = ["def main", "return", "x", "[argument for argument in argv if argument]" * 3, "if", "\u00e9\u2028\u65e5"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    tensors = {name: 5 * tensor for name, tensor in published.random_tensors(published.llama_shapes()).items()}
    source = published.write_folder(root / "in", published.LLAMA, tensors)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    importing.import_checkpoint(source, epath.Path(root / "run"))
    return root / "run"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "id": n}) + "\n" for n, prompt in enumerate(PROMPTS)))
    return path


def run(workdir, prompts, output, *flags: str) -> list[dict]:
    arguments = [f"--workdir={workdir}", f"--prompts={prompts}", f"--output={output}", "--max_tokens=8", *flags]
    assert generate_command([*arguments, "--batch_size=2"]) == 0
    return [json.loads(line) for line in output.read_bytes().decode().split("\n")[:-1]]


def test_an_interrupted_file_is_completed_to_the_same_bytes(workdir, prompts, tmp_path):
    output, record = tmp_path / "out.jsonl", tmp_path / "out.jsonl.settings.json"
    lines = run(workdir, prompts, output, "--n=2", "--seed=3")
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert all(line["completion"] for line in lines)
    assert all(first["completion"] != second["completion"] for first, second in zip(*[iter(lines)] * 2, strict=True))
    content = output.read_bytes()
    ends = [at for at, byte in enumerate(content, 1) if byte == 10]
    for size in (0, 5, ends[0], ends[1], ends[2] + 7, ends[10], len(content)):
        output.write_bytes(content[:size])
        run(workdir, prompts, output, "--n=2", "--seed=3")
        assert output.read_bytes() == content
    output.unlink()
    with pytest.raises(UserError, match=r"was made with seed=3, not 4 \(out\.jsonl\.settings\.json\); give the same"):
        run(workdir, prompts, output, "--n=2", "--seed=4")
    record.unlink()
    output.write_text("mine")
    with pytest.raises(UserError, match=r"already exists, without out\.jsonl\.settings\.json"):
        run(workdir, prompts, output)
    assert output.read_text() == "mine"


def test_a_completion_does_not_depend_on_the_other_prompts(workdir, prompts, tmp_path):
    greedy = run(workdir, prompts, tmp_path / "out.jsonl", "--temperature=0")
    shutil.copy(prompts, tmp_path / "alone.jsonl")
    for number in (0, 3, 5):
        (tmp_path / "alone.jsonl").write_text(json.dumps({"prompt": PROMPTS[number]}) + "\n")
        (line,) = run(workdir, tmp_path / "alone.jsonl", tmp_path / f"alone{number}.jsonl", "--temperature=0")
        assert line == greedy[number]
    with loading.load(epath.Path(workdir)) as loaded:
        texts = complete(loaded, PROMPTS, Sampling(max_tokens=8, temperature=0))
    assert [line["completion"] for line in greedy] == texts


@pytest.mark.slow
def test_stop_texts_end_a_completion(workdir, prompts, tmp_path):
    free = run(workdir, prompts, tmp_path / "free.jsonl", "--temperature=0", "--max_tokens=40")
    stop = [line["completion"][3:5] for line in free[:3]]
    flags = [f"--stop={text}" for text in stop]
    lines = run(workdir, prompts, tmp_path / "out.jsonl", "--temperature=0", "--max_tokens=40", *flags)
    for line, before in zip(lines, free, strict=True):
        ends = [before["completion"].find(text) for text in stop if text in before["completion"]]
        assert line["completion"] == before["completion"][: min(ends, default=None)]
    assert sum(line != before for line, before in zip(lines, free, strict=True)) >= 3


@pytest.mark.slow
def test_messages_pass_through_the_chat_template(workdir, tmp_path):
    dialogue = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    records = [{"messages": dialogue}, {"prompt": "c"}, {"messages": dialogue[:1]}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = run(workdir, path, tmp_path / "out.jsonl", "--chat", "--temperature=0", "--system=s")
    assert [{name: line[name] for name in line if name != "completion"} for line in lines] == records
    texts = ["<system>s\n<user>a\n<assistant>b\n<user>c\n", "<system>s\n<user>c\n", "<system>s\n<user>a\n"]
    with loading.load(epath.Path(workdir)) as loaded:
        plain = complete(loaded, [f"{text}<assistant>" for text in texts], Sampling(max_tokens=8, temperature=0))
    assert [line["completion"] for line in lines] == plain


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        ({"text": "a"}, [], r"line 2: has no text in the field 'prompt'"),
        ({"messages": []}, [], r"line 2: has no text in the field 'prompt'; `messages` need --chat"),
        ({"messages": []}, ["--chat"], r"line 2: messages must be a list of objects"),
        ({"messages": [{"content": "a"}]}, ["--chat"], r"line 2: messages must be a list of objects"),
        ({"messages": [{"role": "system"}]}, ["--chat", "--system=s"], r"line 2: messages has a system message of its"),
        ({"prompt": "\ud800"}, [], r"line 2: prompt contains half of a surrogate pair"),
    ],
)
def test_bad_lines_are_refused_before_anything_is_written(workdir, tmp_path, line, flags, message):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a"}\n' + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        run(workdir, path, output, *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=a", "--prompts=b"], "not allowed with argument"),
        ([], "one of the arguments --prompt --prompts is required"),
        (["--prompts=a"], "--prompts: needs --output=FILE.jsonl"),
        (["--prompt=a", "--output=b"], "--output: needs --prompts=FILE.jsonl"),
        (["--prompt=a", "--batch_size=2"], "--batch_size=2: only --prompts=FILE has batches"),
        (["--prompt=a", "--length_penalty=2"], "--length_penalty=2: only a beam search has one"),
        (["--prompt=a", "--n=2", "--temperature=0"], "--n=2: --temperature=0 always takes the same text"),
        (["--prompt=a", "--beams=2", "--stop=a"], "--stop: a beam search does not draw tokens"),
        (["--prompt=a", "--beams=2", "--temperature=0"], "--temperature: a beam search does not draw tokens"),
        (["--prompt=a", "--beams=2", "--n=3"], "--n=3: a search with --beams=2 finds only so many"),
        (["--prompt=a", "--beams=2"], "beams=2: model.family='decoder' is not an encoder-decoder"),
        (["--prompts=a", "--output=b", "--beams=2"], "beams=2: model.family='decoder' is not an encoder-decoder"),
        (["--prompts=a", "--output=b"], "--prompts=a: cannot be read"),
    ],
)
def test_flags_that_do_not_fit_are_refused(workdir, flags, message):
    with pytest.raises(UserError, match=message):
        generate_command([f"--workdir={workdir}", *flags])


def test_samples_and_prompts_are_printed(workdir, capsys):
    arguments = [f"--workdir={workdir}", "--prompt=def main", "--max_tokens=6", "--seed=1"]
    assert generate_command([*arguments, "--n=2", "--repetition_penalty=1.3", "--min_p=0.01"]) == 0
    first, second = capsys.readouterr().out.split("--- 'def main' ---\n")[1:]
    assert first.startswith("def main") and second.startswith("def main") and first != second
