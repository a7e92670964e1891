"""A headless Chromium that tests can ask about a page: the W3C WebDriver protocol, spoken with the standard library.

It needs `chromium` and `chromedriver` (Debian: packages chromium and chromium-driver).
"""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""How the protocol names a reference to an element."""
MISSING = not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome")))
needs_browser = pytest.mark.skipif(
    MISSING, reason="no chromedriver and Chromium here; Debian: chromium chromium-driver"
)


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._at = f"{address}/session/{session}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A command of the protocol; its value."""
        return _ask(method, f"{self._at}/{path}", body)

    def open(self, path: Path) -> None:
        self.ask("POST", "url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that JavaScript returns."""
        return self.ask("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def resize(self, width: int, height: int) -> None:
        self.ask("POST", "window/rect", {"width": width, "height": height})

    def find(self, selector: str) -> str:
        return self.ask("POST", "element", {"using": "css selector", "value": selector})[ELEMENT]

    def point_at(self, selector: str) -> None:
        """Move the mouse over an element."""
        self._act(selector)

    def click(self, selector: str) -> None:
        """With the mouse, where a person would."""
        self._act(selector, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def tap(self, selector: str) -> None:
        """With a finger."""
        down_up = ({"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})
        self._act(selector, *down_up, kind="touch")

    def press(self, *keys: str) -> None:
        """Keys of the keyboard, each pressed and let go."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("GET", "screenshot"))

    def _act(self, selector: str, *more: dict[str, Any], kind: str = "mouse") -> None:
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {ELEMENT: self.find(selector)}}
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": [move, *more]}
        self.ask("POST", "actions", {"actions": [pointer]})


@contextmanager
def chromium(*, dark: bool = False, width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """A browser without network; it ends with the block."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--window-size={width},{height}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        address = f"http://127.0.0.1:{port}"
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": options},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = _ask("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        browser = Browser(address, session)
        yield browser
        browser.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.communicate(timeout=20)


def problems(browser: Browser) -> list[str]:
    """What the page wrote to the console: errors, refused loads, warnings."""
    return [entry["message"] for entry in browser.ask("POST", "se/log", {"type": "browser"})]


def _ask(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/"), data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
