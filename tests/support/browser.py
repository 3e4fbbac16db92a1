"""A real browser: headless Chromium, driven through two pipes, so that no port is open."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The program; None if this machine has none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """A page as it was loaded once.

    Attributes:
        messages: What it wrote to the console, errors and refused content included.
        requests: The addresses that it asked for, itself left out.
    """

    session: str
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """Speaks the DevTools protocol: messages of JSON, each ended by a zero byte."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._answers = to, answers
        self._buffer = b""
        self._number = 0
        self._visits: dict[str, Visit] = {}
        self._loaded: set[str] = set()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and waits for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != message["id"]:
            self._observe(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def visit(self, page: Path, width: int, height: int = 900, scheme: str = "light", scale: float = 1) -> Visit:
        """Loads a file in a tab of its own.

        Args:
            page: The file.
            width: Of the window, in pixels of CSS.
            height: The same.
            scheme: `light` or `dark`.
            scale: Pixels of a screenshot for each pixel of CSS.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session: str = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        visit = self._visits[session] = Visit(session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", session, features=features)
        address = page.resolve().as_uri()
        self.call("Page.navigate", session, url=address)
        while session not in self._loaded:
            self._observe(self._next())
        # What is still on its way, such as an icon, is asked for by then.
        self.evaluate(visit, "new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        visit.requests = [each for each in visit.requests if each != address and not each.startswith("data:")]
        return visit

    def evaluate(self, visit: Visit, expression: str) -> Any:
        """The value of an expression in a page."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", visit.session, **options)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def screenshot(self, visit: Visit, whole: bool = False) -> bytes:
        """What the window shows as a PNG, or the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", visit.session, captureBeyondViewport=whole)["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise RuntimeError("the browser has exited")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _observe(self, event: dict[str, Any]) -> None:
        visit, parameters = self._visits.get(event.get("sessionId", "")), event.get("params", {})
        if visit is None:
            return
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                visit.messages.append(str([each.get("value") for each in parameters["args"]]))
            case "Runtime.exceptionThrown":
                visit.messages.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                visit.messages.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                visit.requests.append(parameters["request"]["url"])
            case "Page.loadEventFired":
                self._loaded.add(visit.session)


def _high_pipe() -> tuple[int, int]:
    """A pipe whose descriptors are none of those that the browser is given."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 20) for each in low)
    for each in low:
        os.close(each)
    return high[0], high[1]


@contextmanager
def started_browser(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    with TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        (commands, to), (answers, back) = _high_pipe(), _high_pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-extensions", "--disable-background-networking", "--hide-scrollbars"]
        # The protocol wants the descriptors 3 and 4.
        shell = f'exec "$@" 3<&{commands} 4>&{back} {commands}<&- {back}>&-'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            pass_fds=(commands, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(back)
        try:
            yield Browser(to, answers)
        finally:
            os.close(to)
            os.close(answers)
            process.terminate()
            process.wait()
