"""Signals while training: the first requests to save and stop, the second ends the process and prints what is lost."""

import os
import signal

import pytest

from llmjax.parallel import interrupts
from llmjax.train.loop import _describe_loss
from llmjax.train.preemption import Preemption


@pytest.fixture
def preemption():
    old = {number: signal.signal(number, signal.SIG_DFL) for number in interrupts.SIGNALS}
    found = Preemption(lambda: "steps 5 to 7 are lost")
    yield found
    found.close()
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in old)
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_the_first_signal_asks_and_the_second_ends(preemption, number):
    assert not preemption.reached()
    os.kill(os.getpid(), number)
    assert preemption.reached()
    with pytest.raises(interrupts.Stopped, match=r"; steps 5 to 7 are lost: rerun the same command") as stopped:
        os.kill(os.getpid(), number)
        signal.getsignal(number)  # Python runs the handler before this
    assert stopped.value.status == 128 + number


def test_several_processes_count_every_check(preemption, monkeypatch):
    """The coordination service answers True at one number: numbers grow by 1, and the answer stays."""
    monkeypatch.setattr(preemption, "_single", False)
    seen = []

    def reached_sync_point(number: int) -> bool:
        seen.append(number)
        return number == 3

    monkeypatch.setattr("llmjax.train.preemption.multihost_utils.reached_preemption_sync_point", reached_sync_point)
    assert [preemption.reached() for _ in range(5)] == [False, False, True, True, True]
    assert seen == [1, 2, 3]
    preemption._single = True


def test_what_is_ignored_stays_ignored(monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        found = Preemption(lambda: "")
        os.kill(os.getpid(), signal.SIGHUP)
        assert not found.reached()
        found.close()
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize(
    ("step", "newest", "expected"),
    [
        (7, 4, "steps 5 to 7 are lost"),
        (7, None, "steps 1 to 7 are lost"),
        (7, 7, "nothing is lost"),
        (0, None, "no step was finished"),
    ],
)
def test_what_is_lost(step, newest, expected):
    assert _describe_loss(step, newest) == expected
