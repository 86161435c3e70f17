"""`llmjax serve` as a process."""

import re
import subprocess

from tests import jobs


def start(workdir, *flags: str, **env: str) -> tuple[subprocess.Popen, str]:
    """A server, and its address."""
    command = [str(jobs.LLMJAX), "serve", f"--workdir={workdir}", "--port=0", *flags]
    process = subprocess.Popen(command, env=jobs.environment(**env), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if found := re.match(r"serving run at (http://\S+): ", line):
            return process, found[1]
    raise AssertionError(f"exit {process.wait()}")


def stop(process: subprocess.Popen, number: int) -> str:
    """What a server prints after a signal; it must end with status 0."""
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return printed
