"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol: plain JSON over HTTP, no library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def missing() -> str:
    """Why no browser can be started; empty where one can."""
    if _binary() is None:
        return "no Chromium is installed (Debian: apt-get install chromium chromium-driver)"
    if shutil.which("chromedriver") is None:
        return "no chromedriver is installed (Debian: apt-get install chromium-driver)"
    return ""


def _binary() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page at a time."""

    def __init__(self, session_url: str) -> None:
        self._url, self._page = session_url, ""

    def open(self, page: Path) -> None:
        """Loads a page; what was logged before is forgotten."""
        for kind in ("browser", "performance"):
            self.log(kind)
        self._page = page.as_uri()
        self._post("url", {"url": self._page})

    def run(self, script: str, *arguments: object) -> Any:
        """What the body of a function returns in the page."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: object) -> Any:
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, *, width: int, height: int = 900, scheme: str = "light", media: str = "") -> None:
        """Sets the size of the window, light or dark, and `print` for the layout on paper."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", media=media, features=[feature])

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.devtools("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_CODES[key])

    def point_at(self, x: float, y: float, *, is_click: bool = False) -> None:
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if is_click else ():
            self.devtools("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: `browser` is the console, `performance` holds the network."""
        entries: list[dict[str, Any]] = self._post("se/log", {"type": kind})
        return entries

    def requests(self) -> list[str]:
        """Addresses that the page asked for since the last call; those of the browser's own start page are left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if one["documentURL"].split("#")[0] == self._page]

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self.devtools("Page.printToPDF", preferCSSPageSize=True)["data"])

    def close(self) -> None:
        _request(self._url, method="DELETE")

    def _post(self, path: str, data: object) -> Any:
        return _request(f"{self._url}/{path}", data)


_CODES = {"Tab": 9, "Escape": 27, "Enter": 13}


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile folder of its own, closed at the end."""
    log = profile.with_suffix(".log")
    with log.open("wb") as stream:
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"}
        )
        try:
            base = f"http://127.0.0.1:{_port(driver, log)}"
            browser = Browser(f"{base}/session/{_new_session(base, profile)}")
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()
            driver.wait(timeout=20)


def _new_session(base: str, profile: Path) -> str:
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
    flags += [f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": _binary(), "args": flags},
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }
    session: str = _request(f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
    return session


def _port(driver: subprocess.Popen[bytes], log: Path) -> int:
    """chromedriver takes a free port and says which."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and driver.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if "started successfully on port" in line:
                return int(line.rsplit(" ", 1)[1].rstrip("."))
        time.sleep(0.05)
    raise RuntimeError(f"chromedriver did not start: {log.read_text(errors='replace')}")


def _request(url: str, data: object = None, *, method: str = "POST") -> Any:
    body = None if method == "DELETE" else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.read().decode(errors='replace')[:2000]}") from error
