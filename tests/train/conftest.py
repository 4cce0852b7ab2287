"""A real browser, for the pages that we write."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def browser() -> Callable[[Path], tuple[str, list[str], list[str]]]:
    """Opens a page: its title after its scripts ran, what it asked the network for, what its policy refused."""
    return open_in_browser


def open_in_browser(page: Path) -> tuple[str, list[str], list[str]]:
    """The browser asks for things of its own (updates, the time); such requests have no origin in its net log."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    profile, log = page.with_suffix(".profile"), page.with_suffix(".netlog")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", f"--log-net-log={log}"]
    command += ["--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    events = json.loads(log.read_text())
    start = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in events["events"] if event["type"] == start and "params" in event]
    asked = [params["url"] for params in requests if params.get("initiator") not in (None, "not an origin")]
    refused = [line for line in done.stderr.splitlines() if "Content Security Policy" in line]
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    return html.unescape(title[1]), asked, refused
