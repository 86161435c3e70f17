"""The page at / in Chromium: answers appear while they are written, turns follow each other, and errors are shown."""

import signal

import pytest

from llmjax.inference.sampling import Sampling
from tests.serve import browser
from tests.serve.runs import BYTES, CHAT, generate_texts, write_run
from tests.serve.server import start, stop

MISSING = browser.missing_programs()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: apt-get install chromium chromium-driver"),
]

ENTER = "\ue007"
IS_IDLE = "!document.querySelector('#send').disabled"


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """The page of a server whose texts may be long."""
    process, address = start(write_run(tmp_path_factory.mktemp("page") / "run"), "--slots=2", "--context=8192")
    try:
        with browser.start_browser(tmp_path_factory.mktemp("profile")) as window:
            window.open(address)
            yield window
    finally:
        stop(process, signal.SIGTERM)


def boxes(window: browser.Browser, role: str) -> list[str]:
    return window.run(f"return [...document.querySelectorAll('.{role}')].map(box => box.textContent)")


def set_up(window: browser.Browser, max_tokens: int) -> None:
    """A new chat whose answers are greedy."""
    window.click("#reset")
    window.run(
        f"document.querySelector('#temperature').value = 0; document.querySelector('#tokens').value = {max_tokens}"
    )
    window.wait_for(IS_IDLE)


def ask(window: browser.Browser, question: str, send: str = ENTER) -> None:
    window.type_into("#question", question + send)


def test_two_turns(window):
    assert window.wait_for("document.querySelector('h1').textContent === 'Chat with run'")
    set_up(window, 40)
    messages, answers = [], []
    for question, send in (("hello", ENTER), ("and then?", "")):
        ask(window, question, send)
        if not send:
            window.click("#send")
        messages.append({"role": "user", "content": question})
        answers += generate_texts([CHAT.encode(messages, BYTES)], Sampling(max_tokens=40, temperature=0))
        messages.append({"role": "assistant", "content": answers[-1]})
        window.wait_for(f"document.querySelectorAll('.assistant').length === {len(answers)} && {IS_IDLE}")
    assert boxes(window, "assistant") == answers and len(set(answers)) == 2
    assert boxes(window, "user") == ["hello", "and then?"] and not boxes(window, "error")


def test_text_appears_while_it_is_written_until_stop(window):
    set_up(window, 8000)
    ask(window, "hello")
    window.wait_for("!document.querySelector('#stop').disabled && document.querySelector('.assistant').textContent")
    window.click("#stop")
    window.wait_for(IS_IDLE)
    (answer,) = boxes(window, "assistant")
    assert 0 < len(answer) < 8000 and not boxes(window, "error")
    set_up(window, 10)
    assert boxes(window, "user") == boxes(window, "assistant") == []


def test_an_error_is_shown_and_the_question_stays(window):
    set_up(window, 9000)
    ask(window, "hello")
    window.wait_for(f"document.querySelector('.error') && {IS_IDLE}")
    assert boxes(window, "error")[0].startswith("max_tokens=9000: the prompt has ")
    assert boxes(window, "user") == boxes(window, "assistant") == []
    assert window.run("return document.querySelector('#question').value") == "hello"
    window.run("document.querySelector('#question').value = ''")
