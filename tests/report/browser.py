"""A page in headless Chromium, driven through its debugging protocol."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60.0


class Browser:
    """One page; a context manager.

    Args:
        page: the file that is opened.
        profile: an empty folder for the browser's own files.
    """

    def __init__(self, page: Path, profile: Path, width: int = 1280) -> None:
        assert CHROMIUM
        self.page, self.width = page, width
        self.requests: list[str] = []
        self.complaints: list[str] = []
        """Exceptions and errors on the page's console."""
        self._number = 0
        self._profile = profile
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        arguments += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "--remote-allow-origins=*"]
        self._process = subprocess.Popen(
            [CHROMIUM, *arguments, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        self._socket = connect(self._address(), max_size=None)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        metrics = {"width": self.width, "height": 900, "deviceScaleFactor": 1, "mobile": self.width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        self._call("Page.navigate", url=self.page.resolve().as_uri())
        self.wait("document.readyState === 'complete'")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + SECONDS
        while not self.value(condition):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.1)

    def hover(self, selector: str) -> None:
        """Move the mouse onto the first element that `selector` finds."""
        self.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.value(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _address(self) -> str:
        """Of the page's debugging socket; Chromium writes its port into its profile."""
        file, deadline = self._profile / "DevToolsActivePort", time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, httpx.HTTPError, StopIteration):
                port = int(file.read_text().splitlines()[0])
                targets = httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
                return str(next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page"))
            time.sleep(0.1)
        raise AssertionError("Chromium did not start")

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while (message := json.loads(self._socket.recv(timeout=SECONDS))).get("id") != self._number:
            self._note(message)
        assert "error" not in message, message
        return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.complaints.append(message["params"]["entry"]["text"])
