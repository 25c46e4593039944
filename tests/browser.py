"""A headless Chromium and its pages, driven by the DevTools protocol through a pipe, with the standard library."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path


NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Without a network, a display and a user: what starts by itself otherwise asks for all three.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
SECONDS = float(os.environ.get("SAS_HF_BROWSER_SECONDS", "120"))  # that an answer may take on a busy machine


def find_browser() -> str | None:
    """The file of a Chromium: what `CHROMIUM` names, or one that the shell would find."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A Chromium that runs until the `with` block ends."""

    def __init__(self, binary: str):
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        read, self.to_browser = os.pipe()
        self.from_browser, write = os.pipe()
        # It reads commands from 3 and writes to 4, whichever numbers our ends have.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read, write)]
        os.close(read), os.close(write)
        actions = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
        actions += [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1, 2)]
        command = [binary, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        self.process = os.posix_spawn(binary, command, os.environ, file_actions=actions, setpgroup=0)
        for end in ends:
            os.close(end)
        self.number, self.unread, self.answers, self.events = 0, b"", {}, []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.to_browser), os.close(self.from_browser)
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, method: str, session: str | None = None, **parameters) -> dict:
        """What the browser answers; a RuntimeError of its error, a TimeoutError of its silence."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        wanted, waiting = self.number, json.dumps(message).encode() + b"\0"
        while waiting:
            waiting = waiting[os.write(self.to_browser, waiting) :]
        end = time.monotonic() + SECONDS
        while wanted not in self.answers:
            self.receive(end, method)
        answer = self.answers.pop(wanted)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def receive(self, end: float, awaited: str) -> None:
        if not select.select([self.from_browser], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError(f"The browser did not answer {awaited} in {SECONDS:g} s.")
        chunk = os.read(self.from_browser, 1 << 20)
        if not chunk:
            raise RuntimeError("The browser has ended.")
        *whole, self.unread = (self.unread + chunk).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self.answers[message["id"]] = message
            else:
                self.events.append(message)

    def wait_for(self, method: str, session: str) -> dict:
        """The next event of this name, which is used up."""
        end = time.monotonic() + SECONDS
        while True:
            for event in self.events:
                if event["method"] == method and event.get("sessionId") == session:
                    self.events.remove(event)
                    return event["params"]
            self.receive(end, method)

    def open(self, place: Path | str, width: int = 1280, height: int = 900, scheme: str = "light") -> "Page":
        return Page(self, place, width, height, scheme)


class Page:
    """A file or an address, loaded; `scheme` is what the user's system prefers, "light" or "dark"."""

    def __init__(self, browser: Browser, place: Path | str, width: int, height: int, scheme: str):
        self.browser = browser
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.go(place)

    def go(self, place: Path | str) -> None:
        """To another file or address."""
        self.send("Page.navigate", url=place if isinstance(place, str) else place.absolute().as_uri())
        self.browser.wait_for("Page.loadEventFired", self.session)

    def send(self, method: str, **parameters) -> dict:
        return self.browser.send(method, self.session, **parameters)

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str):
        """What an expression of JavaScript gives, awaited; a RuntimeError of what it throws."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """A place in an element, by shares of its width and height, scrolled into view."""
        return tuple(
            self.run(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
                f"e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
                f"return [r.x + r.width * {x}, r.y + r.height * {y}]; }})()"
            )
        )

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        place = self.point(selector, x, y)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        place = self.point(selector, x, y)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what was asked of a network, so far."""
        self.run("new Promise(done => setTimeout(done))")
        found = []
        for event in self.browser.events:
            told, method = event["params"], event["method"]
            if event.get("sessionId") != self.session:
                continue
            if method == "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(argument.get("value")) for argument in told["args"]))
            elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
            elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
                found.append(f"asked for {told['request']['url']}")
        return found

    def screenshot(self, path: Path, whole: bool = False) -> None:
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)


KEYS = {
    "Enter": 13,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
}
