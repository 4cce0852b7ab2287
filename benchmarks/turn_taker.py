"""Runs a training program as it is, and lets it train only while it is its turn:

    python turn_taker.py ORDERS REPORTS PROGRAM.py [arguments]      python turn_taker.py ORDERS REPORTS -m MODULE ...

ORDERS and REPORTS are pipes. After its first step the program waits; `12` on ORDERS lets it train 12 steps more, after
which a line of JSON on REPORTS says what they took, and it waits again; `free` lets it run to its end, and each step is
reported as it ends. Steps are those of the optimiser, which torch tells of, so every program is measured in the same
way and none is changed. Stands alone: it runs in environments that have no loraloom.
"""

import json
import os
import runpy
import sys
import time
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

FEWEST_WEIGHTS = 16  # what trains fewer is tried out, not trained


class Turns:
    """The program's side of the pipes."""

    def __init__(self, orders: str, reports: str) -> None:
        self.orders, self.reports = open(orders), open(reports, "w")  # noqa: SIM115 # as long as the process
        self.left, self.free, self.ready = 0, False, False
        self.seconds: list[float] = []
        self.began, self.busy = time.perf_counter(), time.process_time()
        self.before = self.began

    def after_step(self, optimizer: Any, *others: Any) -> None:
        """Called by torch when an optimiser has made its step."""
        weights = (weight.numel() for group in optimizer.param_groups for weight in group["params"])
        if not self.ready and sum(weights) < FEWEST_WEIGHTS:
            return
        self.ready = True
        if self.free:
            self._report({"time": time.time()})
            return
        self.left -= 1
        self.seconds.append(time.perf_counter() - self.before)
        if self.left <= 0:
            self._wait()
        self.before = time.perf_counter()

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, processor = time.perf_counter() - self.began, time.process_time() - self.busy
        told = {"time": time.time(), "seconds": self.seconds, "wall": wall, "processor": processor, "peak": peak()}
        self._report(told)
        order = self.orders.readline().strip()
        self.free, self.left, self.seconds = order == "free", int(order) if order.isdigit() else 0, []
        if not order:
            os._exit(0)  # whoever gave the orders is gone or has seen enough
        self.began, self.busy = time.perf_counter(), time.process_time()

    def _report(self, values: dict[str, Any]) -> None:
        self.reports.write(json.dumps(values) + "\n")
        self.reports.flush()


def peak() -> dict[str, int]:
    """Bytes: the most that the process held, all its memory counted, and the most on the GPU."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    found = {"process": int(lines["VmHWM"].split()[0]) * 1024}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    """Runs the program under its own name, with its own arguments."""
    orders, reports, program, *arguments = sys.argv[1:]
    register_optimizer_step_post_hook(Turns(orders, reports).after_step)
    if program == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        sys.path[0] = os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
