"""A headless Chromium, driven through the WebDriver protocol of chromedriver (https://www.w3.org/TR/webdriver2/)."""

import base64
from collections.abc import Iterator
import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import time
from typing import Any
import urllib.error
import urllib.request

PROGRAMS = ("chromium", "chromedriver")  # of the Debian packages chromium and chromium-driver
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=900,900",
]
_SECONDS = 90.0  # generous, since a busy machine is slow and a condition that holds ends the wait


def missing_programs() -> list[str]:
    """Which of PROGRAMS are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Browser:
    """One window. `url` is that of a WebDriver session."""

    def __init__(self, url: str):
        self._url = url

    def open(self, address: str) -> None:
        """Load a page."""
        _call(f"{self._url}/url", {"url": address})

    def run(self, script: str) -> Any:
        """The value that a function with this JavaScript body returns in the page."""
        return _call(f"{self._url}/execute/sync", {"script": script, "args": []})

    def wait_for(self, expression: str) -> Any:
        """The first true value of a JavaScript expression; an AssertionError names the one that stays false."""
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            if value := self.run(f"return {expression}"):
                return value
            time.sleep(0.05)
        text = self.run("return document.body.innerText")
        raise AssertionError(f"{expression} is not true after {_SECONDS:g} s; the page shows: {text}")

    def type_into(self, selector: str, keys: str) -> None:
        """Press keys in a field."""
        _call(f"{self._url}/element/{self._find(selector)}/value", {"text": keys})

    def click(self, selector: str) -> None:
        """Click on an element."""
        _call(f"{self._url}/element/{self._find(selector)}/click", {})

    def screenshot(self, path: pathlib.Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(_call(f"{self._url}/screenshot")))

    def _find(self, selector: str) -> str:
        (element,) = _call(f"{self._url}/element", {"using": "css selector", "value": selector}).values()
        return element


@contextlib.contextmanager
def start_browser(profile: pathlib.Path) -> Iterator[Browser]:
    """A browser with a new profile in an empty folder; both programs have ended afterwards."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = f"http://127.0.0.1:{_read_port(driver)}"
        options = {"binary": shutil.which("chromium"), "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        session = _call(f"{address}/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        url = f"{address}/session/{session['sessionId']}"
        try:
            yield Browser(url)
        finally:
            _call(url, method="DELETE")
    finally:
        driver.terminate()
        driver.communicate(timeout=60)


def _read_port(driver: subprocess.Popen) -> int:
    assert driver.stdout
    printed = []
    for line in driver.stdout:
        printed.append(line)
        if found := re.search(r"started successfully on port (\d+)", line):
            return int(found[1])
    raise AssertionError(f"chromedriver does not start: {''.join(printed)}")


def _call(url: str, body: Any = None, *, method: str | None = None) -> Any:
    """The value of a WebDriver command; an AssertionError has its error."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method)
    # Without proxies of the environment: the address is of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_SECONDS) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()[:500]}") from None
