"""Headless Chromium on a local page, driven over its DevTools pipe: no driver, no Python package."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What it prints on stderr is its own (no D-Bus, no GPU); a page's messages come over the pipe.
_FLAGS = "--headless --remote-debugging-pipe --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"


class Browser:
    """One tab. `messages` collects what pages say on the console, errors and refusals of their policy included, and
    `requests` what they ask for."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.last = 0
        self.received = b""
        self.session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command's result."""
        self.last += 1
        message: dict[str, Any] = {"id": self.last, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.last:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            part = os.read(self.from_browser, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self.received += part
        line, _, self.received = self.received.partition(b"\0")
        event = json.loads(line)
        method, params = event.get("method"), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        return dict(event)

    def open(self, page: Path, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Load a file, at a width in CSS pixels and with a preferred color scheme, until its load event."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        answer = self.call("Page.navigate", url=page.resolve().as_uri())
        if "errorText" in answer:
            raise RuntimeError(f"'{page}': {answer['errorText']}")
        while not self.loaded:
            self._next()

    def evaluate(self, code: str) -> Any:
        """The JSON value of an expression in the page. Raises RuntimeError where it throws."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, target: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(shot["data"]))

    def print_pdf(self, target: Path) -> None:
        target.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium with a fresh profile in `profile`; ended afterwards."""
    read_commands, to_browser = os.pipe()
    from_browser, write_answers = os.pipe()
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    shell = f'exec "$0" {_FLAGS} --user-data-dir="$1" about:blank 3<&{read_commands} 4>&{write_answers}'
    process = subprocess.Popen(
        ["bash", "-c", shell, str(CHROMIUM), str(profile)],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)
        process.terminate()
        process.wait(30)
        os.close(from_browser)
