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
def opened(tmp_path: Path) -> Callable[[str, str], str]:
    """Opens a page with a probe at its end, which asks for one thing; its title after the scripts of both ran.

    Opened twice: with its policy, and without it, where only the page itself can keep it from asking.
    """

    def opened(page: str, probe: str) -> str:
        guarded, unguarded = tmp_path / "guarded.html", tmp_path / "unguarded.html"
        guarded.write_text(page + probe, "utf-8")
        without_policy = page.replace("Content-Security-Policy", "none")
        assert without_policy != page
        unguarded.write_text(without_policy + probe, "utf-8")

        title, asked, refused = open_in_browser(guarded)
        assert asked == []
        assert len(refused) == 1
        assert "control.invalid" in refused[0]

        _, asked, refused = open_in_browser(unguarded)
        assert asked == ["http://control.invalid/a.png"]
        assert refused == []
        return title

    return opened


def open_in_browser(page: Path) -> tuple[str, list[str], list[str]]:
    """A page's title after its scripts ran, what it asked the network for, what its policy refused.

    The browser asks for things of its own (updates, the time); such requests have no origin in its net log.
    """
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
