"""Processes that train, and a real browser for the pages that we write."""

import html
import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

PRELOADED = [
    *("loraloom.train.build", "loraloom.train.sharding", "loraloom.train.precompute", "torch.distributed.fsdp", "peft"),
    *("torch.distributed.checkpoint.state_dict", "torch._dynamo", "transformers.models.clip.modeling_clip"),
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
]


class Started:
    """A process on its way, and what it said so far."""

    def __init__(self, process: Any, log: Path):
        self.process, self.log, self.pid = process, log, process.pid

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; minus the signal's number if one ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still runs after {seconds} s: {self.said[-2000:]}"
        return self.process.exitcode


class Start(Protocol):
    def __call__(
        self,
        program: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        own_group: bool = False,
    ) -> Started: ...


@pytest.fixture
def start(tmp_path) -> Iterator[Start]:
    """Starts `python -m MODULE ARGUMENTS`, or a file, in a process of its own.

    It is forked from one that has imported the libraries and done nothing else: most of a start is imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started: list[Started] = []

    def start(program, *arguments, environment=None, log=None, own_group=False):
        log = log or tmp_path / f"said-{len(started)}.txt"
        given = {"program": program, "arguments": [*arguments], "log": str(log), "own_group": own_group}
        given["environment"] = {**os.environ, **(environment or {})}
        file = str(Path(__file__).with_name("forked.py"))
        process = context.Process(target=runpy.run_path, args=(file, {"given": given}))
        process.start()
        started.append(Started(process, log))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.join()


@pytest.fixture
def run_two(start) -> Callable[..., str]:
    """Runs a program in two processes with gloo, as torchrun does, and answers with what they said."""

    def run_two(program: str, *arguments: str, environment: Mapping[str, str] | None = None, code: int = 0) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(environment or {})}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        both = [start(program, *arguments, environment=shared | rank) for rank in ranks]
        codes = [process.wait(240) for process in both]
        said = "".join(process.said for process in both)
        assert codes == [code, code], said[-3000:]
        return said

    return run_two


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
