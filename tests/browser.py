"""Chromium without a window, driven over the DevTools protocol through a pipe: no driver and no library is needed.

Messages are JSON that ends with a zero byte; Chromium reads them from its file 3 and writes to its file 4.
"""

import base64
import contextlib
import fcntl
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Page", "find_chromium", "open_page"]

ANSWER_S = 60.0


def find_chromium() -> str | None:
    """The program, or None where it is not installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def open_page(folder: Path, *, width: int = 1280, height: int = 900) -> Iterator["Page"]:
    """A page of a browser of its own, whose profile and downloads are in `folder`."""
    program = find_chromium()
    assert program is not None
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (their_in, their_out)]
    os.close(their_in)
    os.close(their_out)

    def as_files_3_and_4() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    command = [program, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--mute-audio"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", "about:blank"]
    process = subprocess.Popen(
        command,
        pass_fds=(3, 4),
        preexec_fn=as_files_3_and_4,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in theirs:
        os.close(fd)
    page = Page(_Pipe(our_in, our_out), folder / "downloads", width, height)
    try:
        page.start()
        yield page
    finally:
        with contextlib.suppress(OSError):
            page.pipe.send("Browser.close", {}, None)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(our_out)


class _Pipe:
    """Requests and answers by number; events in a queue."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.number = 0
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.events: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with os.fdopen(self.reading, "rb", buffering=0) as file:
            rest = b""
            while data := file.read(1 << 16):
                *whole, rest = (rest + data).split(b"\0")
                for message in map(json.loads, whole):
                    if "id" in message:
                        self.answers.put(message)
                    else:
                        with self.changed:
                            self.events.append(message)
                            self.changed.notify_all()
        self.answers.put(None)

    def send(self, method: str, parameters: dict[str, Any], session: str | None) -> int:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self.writing, data) :]
        return self.number

    def ask(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = self.send(method, parameters, session)
        while True:
            answer = self.answers.get(timeout=ANSWER_S)
            if answer is None:
                raise RuntimeError(f"the browser ended before it answered {method}")
            if answer["id"] == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def wait(self, method: str, start: int, **expected: Any) -> dict[str, Any]:
        """The first event of this kind with these values among those from number `start` on."""
        with self.changed:
            while True:
                for event in self.events[start:]:
                    if event["method"] == method and expected.items() <= event["params"].items():
                        found: dict[str, Any] = event["params"]
                        return found
                if not self.changed.wait(ANSWER_S):
                    raise TimeoutError(f"no {method} {expected} came")


class Page:
    """One tab. Every method waits until the browser has done it."""

    def __init__(self, pipe: _Pipe, downloads: Path, width: int, height: int) -> None:
        self.pipe, self.downloads = pipe, downloads
        self.width, self.height = width, height
        self.session: str | None = None

    def start(self) -> None:
        target = self.pipe.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        self.session = self.pipe.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.resize(self.width, self.height)
        self.downloads.mkdir(parents=True, exist_ok=True)
        behaviour = {"behavior": "allow", "downloadPath": str(self.downloads), "eventsEnabled": True}
        self.pipe.ask("Browser.setDownloadBehavior", behaviour)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self.pipe.ask(method, parameters, self.session)

    def goto(self, url: str) -> None:
        """Load a page (never only another part of the same one) and wait for it."""
        self._load("Page.navigate", url="about:blank")
        self._load("Page.navigate", url=url)

    def reload(self) -> None:
        self._load("Page.reload", ignoreCache=True)

    def _load(self, method: str, **parameters: Any) -> None:
        start = len(self.pipe.events)
        answer = self.ask(method, **parameters)
        assert "errorText" not in answer, answer
        self.pipe.wait("Page.loadEventFired", start)

    def js(self, expression: str) -> Any:
        """Value of an expression in the page; a promise is awaited."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression in the page is true."""
        poll = f"const poll = () => ({condition}) ? done(true) : setTimeout(poll, 10); poll();"
        self.js(f"new Promise((done) => {{ {poll} }})")

    def press(self, *keys: str) -> None:
        """Press and let go keys, as a keyboard does: letters, or names such as ArrowDown and Enter."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27}
            code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
            event = {"key": key, "windowsVirtualKeyCode": code}
            self.ask("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.ask("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """The mouse on the middle of the first element of a CSS selector."""
        # What comes into view may load pictures and move the rest: look until nothing has moved for ten frames.
        box = self.js(
            "new Promise((done) => { let last = {}, same = 0; const look = () => {"
            f"const element = document.querySelector({json.dumps(selector)});"
            "element.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = element.getBoundingClientRect().toJSON();"
            "same = box.x === last.x && box.y === last.y ? same + 1 : 0;"
            "if (same === 10) return done(box);"
            "last = box; return requestAnimationFrame(look); }; look(); })"
        )
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, **place)

    def choose(self, selector: str, value: str) -> None:
        """An option of a select."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{element}.value = {json.dumps(value)}")
        self.js(f"{element}.dispatchEvent(new Event('input', {{bubbles: true}}))")

    def fill(self, selector: str, text: str) -> None:
        """Replace the text of an input, as typing does."""
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.type(text)

    def upload(self, selector: str, path: Path) -> None:
        """A file into an input, as its dialog does."""
        found = self.ask("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self.ask("DOM.setFileInputFiles", files=[str(path)], objectId=found["objectId"])

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Another window, or a phone's."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def download(self, selector: str) -> Path:
        """Click, and the file that comes of it."""
        start = len(self.pipe.events)
        self.click(selector)
        begun = self.pipe.wait("Browser.downloadWillBegin", start)
        self.pipe.wait("Browser.downloadProgress", start, guid=begun["guid"], state="completed")
        return self.downloads / str(begun["suggestedFilename"])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        picture = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(picture))

    def use_dark(self, dark: bool = True) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings so far: of scripts, of the console, and what the page's policy refused."""
        found = []
        for event in list(self.pipe.events):
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(str([item.get("value", item.get("description")) for item in parameters["args"]]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"])
            elif event["method"] == "Page.javascriptDialogOpening":
                found.append(f"a dialog: {parameters['message']}")
        return found

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for so far, but for data: ones."""
        events = [event["params"] for event in list(self.pipe.events) if event["method"] == "Network.requestWillBeSent"]
        urls = [str(parameters["request"]["url"]) for parameters in events]
        return [url for url in urls if not url.startswith("data:")]
