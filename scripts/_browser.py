"""A headless Chromium, controlled by its DevTools protocol over two pipes, with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
FLAGS = "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"


def find_browser() -> str | None:
    """The path of a Chromium on this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A page of a new Chromium with an empty profile; a context manager that ends it."""

    def __init__(self, program: str, width: int = 1280, height: int = 800, timeout: float = 60) -> None:
        self.timeout, self.count, self.buffer, self.session = timeout, 0, b"", ""
        self.problems: list[str] = []  # errors of the page's console
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        their_input, self.out = os.pipe()
        self.into, their_output = os.pipe()

        def connect_pipes() -> None:
            """Chromium reads commands from 3 and writes replies to 4."""
            a, b = os.dup(their_input), os.dup(their_output)
            while min(a, b) < 5:
                a, b = os.dup(a), os.dup(b)
            os.dup2(a, 3)
            os.dup2(b, 4)

        command = [program, *FLAGS, "--remote-debugging-pipe", f"--window-size={width},{height}"]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={self.profile.name}", "about:blank"],
            preexec_fn=connect_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)
        self.profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol; RuntimeError with the browser's message where it fails."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self.count:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]
            if reply.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(reply["params"]))

    def _read(self) -> dict[str, Any]:
        """The browser's next message."""
        deadline = time.monotonic() + self.timeout
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.into], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.into, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser does not respond")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, after awaiting a promise."""
        done = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"]))
        return done["result"].get("value")

    def open(self, page: Path, address: str = "", until: str = "document.readyState === 'complete'") -> None:
        """Open a file, as a double click does, and wait until an expression is true."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=page.resolve().as_uri() + address)
        self.wait(until)

    def wait(self, until: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + self.timeout
        while not self.run(f"try {{ Boolean({until}) }} catch {{ false }}"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not true in {self.timeout} s: {until}")
            time.sleep(0.02)

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Give the page's window a size in CSS pixels, each `scale` device pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        self.send("Emulation.setDeviceMetricsOverride", **size, mobile=False)

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key by its name in JavaScript."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        code = codes.get(key, 0)
        text = "\r" if key == "Enter" else text
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def screenshot(self) -> bytes:
        """A screenshot of the page, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
