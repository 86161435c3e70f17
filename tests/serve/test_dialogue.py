"""Answers depend on all turns before them, within the context; `llmjax chat` prints them for the lines of stdin."""

import dataclasses
import subprocess

import pytest

from llmjax.cli import main
from llmjax.errors import UserError
from llmjax.inference.sampling import Sampling
from llmjax.serve.dialogue import Dialogue
from tests import jobs
from tests.serve.runs import BYTES, CHAT, generate_texts, make_engine, write_run

SAMPLING = Sampling(max_tokens=20, temperature=0.7, seed=3, min_p=0.01, repetition_penalty=1.2)


def make_dialogue(context: int = 256, system: str | None = None) -> Dialogue:
    return Dialogue(make_engine(slots=1, context=context), BYTES, CHAT, SAMPLING, system=system)


def ask(dialogue: Dialogue, question: str) -> tuple[int, str]:
    """(number of dropped messages, answer)"""
    dropped, parts = dialogue.ask(question), []
    assert dialogue.answer(parts.append) in ("stop", "length")
    return dropped, "".join(parts)


def expected(*questions: str, system: str | None = None) -> list[str]:
    """The answers of `generate` to the questions of one dialogue."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        messages = [*messages, {"role": "user", "content": question}]
        answers += generate_texts([CHAT.encode(messages, BYTES)], SAMPLING)
        messages = [*messages, {"role": "assistant", "content": answers[-1]}]
    return answers


def test_answers_depend_on_all_turns_until_reset():
    dialogue = make_dialogue()
    assert [ask(dialogue, question) for question in ("hello", "and then?")] == [
        (0, text) for text in expected("hello", "and then?")
    ]
    dialogue.reset()
    assert ask(dialogue, "and then?")[1] == expected("and then?")[0] != expected("hello", "and then?")[1]


def test_a_system_message_stays_after_reset():
    dialogue = make_dialogue(system="Be brief")
    for _ in range(2):
        assert ask(dialogue, "hello")[1] == expected("hello", system="Be brief")[0] != expected("hello")[0]
        dialogue.reset()


def test_the_oldest_turns_are_dropped_where_the_context_is_full():
    dialogue = make_dialogue()
    questions = ["one", "x" * 200, "three"]
    assert [ask(dialogue, question) for question in questions] == [
        (dropped, expected(question)[0]) for dropped, question in zip([0, 2, 2], questions, strict=True)
    ]


def test_an_answer_ends_before_a_stop_string():
    whole = expected("hello")[0]
    stop = whole[len(whole) // 2 :][:3]
    sampling = dataclasses.replace(SAMPLING, stop=(stop,))
    dialogue = Dialogue(make_engine(slots=1, context=256), BYTES, CHAT, sampling)
    assert ask(dialogue, "hello")[1] == whole[: whole.index(stop)]
    assert ask(dialogue, "and then?")[0] == 0  # the slot is free


def test_a_question_that_does_not_fit_is_refused_and_not_added():
    dialogue = make_dialogue()
    with pytest.raises(UserError, match="max_tokens=20: the prompt has 318 tokens, and the context 256"):
        dialogue.ask("x" * 300)
    assert ask(dialogue, "one")[1] == expected("one")[0]


def test_a_context_in_which_nothing_can_be_answered_is_refused():
    make_dialogue(context=38).check()
    with pytest.raises(UserError, match="the prompt has 19 tokens, and the context 37"):
        make_dialogue(context=37).check()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("chat") / "run")


def test_the_command_answers_lines_of_stdin(workdir):
    settings = ["--temperature=0.7", "--seed=3", "--min_p=0.01", "--repetition_penalty=1.2"]
    flags = ["--max_tokens=20", "--context=256", *settings]
    lines = ["hello", "and then?", "/reset", "", "x" * 300, "y" * 200, "one", "/exit", "never read"]
    process = subprocess.run(
        [str(jobs.LLMJAX), "chat", f"--workdir={workdir}", *flags],
        input="".join(f"{line}\n" for line in lines).encode(),  # as bytes, since answers contain carriage returns
        capture_output=True,
        timeout=240,
        env=jobs.environment(PYTHONUTF8="1"),
    )
    assert process.returncode == 0, process.stderr
    answers = [*expected("hello", "and then?"), *expected("y" * 200), *expected("one")]
    assert process.stdout.decode() == "".join(f"{text}\n" for text in answers)
    for words in (
        "/reset forgets what was said, /exit or Ctrl-D ends the chat",
        "(ended after --max_tokens new tokens)",
        "(a new chat)",
        "(refused: max_tokens=20: the prompt has 318 tokens, and the context 256; at most 0 new tokens fit)",
        "(the context is full: the oldest 2 messages are dropped)",
    ):
        assert words in process.stderr.decode()


@pytest.mark.parametrize(("flag", "words"), [("--temperature=-1", "temperature=-1.0"), ("--top_p=0", "top_p=0.0")])
def test_a_bad_setting_is_refused_before_the_first_line(workdir, flag, words):
    with pytest.raises(UserError, match=words):
        main.run(["chat", f"--workdir={workdir}", flag])


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    workdir = write_run(tmp_path / "run", template=None)
    with pytest.raises(UserError, match="has no chat template; import a chat model, train on dialogues, or put"):
        main.run(["chat", f"--workdir={workdir}"])
