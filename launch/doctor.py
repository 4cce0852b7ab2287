"""`loraloom doctor`: versions, devices, and what is broken. Imports are tried in processes of their own."""

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..configs.arguments import Parser
from ..configs.choices import GROUPS, offered, ours, owner
from ..configs.errors import BAD_INPUT, DONE, UserError
from ..configs.machine import cores
from ..configs.words import counted
from .attention_kernels import ASK, attention_lines

State = Literal["usable", "too old", "broken", "absent"]
TIMEOUT = 300.0  # seconds; a first import from a network disk can take a minute

TRIES = {
    "torch": f"""
import os, torch
{ASK}
cuda = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
mps = ["MPS"] if torch.backends.mps.is_available() else []
found = {{"devices": [*cuda, *mps, "CPU"], "cuda": torch.version.cuda, "threads": torch.get_num_threads()}}
kinds = [*(f"cuda:{{k}}" for k in range(len(cuda))), *(["mps"] if mps else []), "cpu"]
found["attention"] = {{name: attention(kind) for name, kind in zip(found["devices"], kinds)}}
""",
    "diffusers": "from diffusers import AutoencoderKL, UNet2DConditionModel",
    "transformers": "from transformers import CLIPTextModel",
    "pyyaml": "import yaml",
    "pillow": "from PIL import Image",
    "tensorboard": "from torch.utils.tensorboard import SummaryWriter",
    "xformers": """
import torch, xformers.ops
device = "cuda" if torch.cuda.is_available() else "cpu"
query = torch.zeros(1, 16, 1, 32, device=device)
xformers.ops.memory_efficient_attention(query, query, query)
""",
    "bitsandbytes": """
import torch, bitsandbytes
weight = torch.nn.Parameter(torch.ones(8192, device="cuda" if torch.cuda.is_available() else "cpu"))
weight.grad = torch.ones_like(weight)
bitsandbytes.optim.AdamW8bit([weight]).step()
""",
    "prodigyopt": """
import torch, prodigyopt
weight = torch.nn.Parameter(torch.ones(4))
weight.grad = torch.ones(4)
prodigyopt.Prodigy([weight]).step()
""",
    "torchao": "from torchao.optim import AdamW8bit",
}
"""What is tried of a package where `import name` alone proves little; `found` comes back."""

OPTIONAL = {
    "torchvision": "not needed: images are read with Pillow",
    "xformers": "not needed: torch's own attention is as fast",
    "wandb": "for `trackers: [wandb]`: pip install wandb",
    "bitsandbytes": "8-bit optimisers: pip install bitsandbytes",
    "prodigyopt": "the Prodigy optimiser: pip install prodigyopt",
    "torchao": "low-precision optimisers: pip install torchao",
    "compel": "weighted prompts: pip install compel",
}
"""Packages that can help or harm, and what to know when they are absent."""

HARM = {
    "torchvision": "built for another torch (a CUDA one beside a CPU torch, say), and then `from transformers import "
    "CLIPTextModel` fails as well; it is not needed: pip uninstall torchvision",
    "xformers": "imports but cannot run with this torch, which diffusers does not notice; it is not needed: "
    "pip uninstall xformers",
}
"""Advice where a broken optional package does more than not work."""

HARNESS = """
import contextlib, json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what packages print is not an answer
for name, code in json.loads(sys.argv[1]).items():
    scope, reason = {}, ""
    try:
        exec(code, scope)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    print(json.dumps([name, reason, scope.get("found", {})]), file=out, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of trying packages in a fresh interpreter."""

    reason: str = ""
    """Why it is broken; empty when it works."""
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One package."""

    name: str
    version: str | None
    floor: str | None
    """Lowest version that loraloom's own metadata allows."""
    state: State
    required: bool
    advice: str


def main(arguments: Sequence[str]) -> int:
    """Print the report. 0 if everything that is required works, else 2."""
    parser = Parser("loraloom doctor", description="Versions, devices, and what is broken.")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="look at these only")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    chosen = parser.parse_args(arguments)
    report = examine(chosen.packages)
    print(json.dumps(report, indent=2) if chosen.json else as_text(report))
    return DONE if report["ok"] else BAD_INPUT


def examine(only: Sequence[str] = ()) -> dict[str, Any]:
    """The report that both forms of output show; of some packages, or of all. UserError for an unknown package."""
    floors = required_floors()
    if unknown := [name for name in only if name not in {*floors, *OPTIONAL}]:
        raise UserError(f"{', '.join(unknown)}: not used by loraloom; it uses: {', '.join([*floors, *OPTIONAL])}")
    required = {name: installed_version(name) for name in floors if name in only or not only}
    optional = {name: installed_version(name) for name in OPTIONAL if name in only or not only}
    batches = [[name for name, version in required.items() if version]]
    batches += [[name] for name, version in optional.items() if version]  # one can break another: apart
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(cores()) as pool:
        for part in pool.map(try_packages, batches):
            outcomes |= part
    rows = [package_row(name, version, floors[name], True, outcomes) for name, version in required.items()]
    rows += [package_row(name, version, None, False, outcomes) for name, version in optional.items()]
    return {
        "loraloom": installed_version("loraloom"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cores(),
        "torch": dict(outcomes.get("torch", Outcome()).found),
        "packages": [asdict(row) for row in rows],
        "plug-ins": plug_ins(),
        "ok": all(row.state == "usable" for row in rows if row.required),
    }


def plug_ins() -> list[dict[str, str]]:
    """What other installed packages offer, which is not imported here; of two under one name neither can be used."""
    found = []
    for package in GROUPS:
        for name, entries in sorted(offered(package).items()):
            also = ["loraloom"] if name in ours(package) else []
            taken = f"also offered by {', '.join([*also, *map(owner, entries[1:])])}" if also or entries[1:] else ""
            found.append({"package": package, "name": name, "from": owner(entries[0]), "problem": taken})
    return found


def try_packages(names: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Outcome]:
    """Try packages one after the other in one fresh interpreter, and the rest in another if it dies."""
    code = {name: TRIES.get(name, f"import {name}") for name in names}
    outcomes: dict[str, Outcome] = {}
    while left := [name for name in names if name not in outcomes]:
        text, ending = _interpret({name: code[name] for name in left}, environment)
        for line in text.splitlines():
            name, reason, found = json.loads(line)
            outcomes[name] = Outcome(reason, found)
        if unanswered := [name for name in left if name not in outcomes]:
            outcomes[unanswered[0]] = Outcome(f"took the interpreter down with it ({ending})")
    return outcomes


def _interpret(code: Mapping[str, str], environment: Mapping[str, str] | None) -> tuple[str, str]:
    """The harness's answers and how it ended."""
    # -P: the folder that one is in may hold a stranger's json.py
    command = [sys.executable, "-P", "-c", HARNESS, json.dumps(code)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            text, _ = process.communicate(timeout=TIMEOUT)
            return text, f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0], f"no answer in {TIMEOUT:.0f} s"


def required_floors() -> dict[str, str]:
    """Package to lowest version, from loraloom's own metadata."""
    return dict(_floors(importlib.metadata.requires("loraloom") or []))


def _floors(requirements: Sequence[str]) -> Iterator[tuple[str, str]]:
    for requirement in requirements:
        match = re.match(r"([\w.-]+)[^>;]*>=\s*([\d.]+)", requirement)
        if match and "extra ==" not in requirement:
            yield match[1].lower(), match[2]


def installed_version(name: str) -> str | None:
    """Version in the package's metadata, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_below(version: str, floor: str) -> bool:
    """Whether the release numbers are lower: 2.5.1+cu124 is below 2.6, and 2.13.0 is not."""
    return _release(version) < _release(floor)


def _release(version: str) -> list[int]:
    numbers = [int(number) for number in re.findall(r"\d+", version.split("+")[0])]
    while numbers and numbers[-1] == 0:  # 2.6.0 is 2.6
        numbers.pop()
    return numbers


def package_row(
    name: str, version: str | None, floor: str | None, required: bool, outcomes: Mapping[str, Outcome]
) -> Row:
    """What is known of a package, and what to do about it."""
    outcome = outcomes.get(name, Outcome())
    if version is None:
        advice = f'pip install "{name}>={floor}"' if required else OPTIONAL[name]
        return Row(name, version, floor, "absent", required, advice)
    if floor and is_below(version, floor):
        return Row(name, version, floor, "too old", required, f'pip install "{name}>={floor}"')
    if outcome.reason:
        cause = outcome.reason.strip().splitlines()[0]
        return Row(name, version, floor, "broken", required, f"{cause}; {_remedy(name, required, outcomes)}")
    return Row(name, version, floor, "usable", required, "")


def _remedy(name: str, required: bool, outcomes: Mapping[str, Outcome]) -> str:
    if not required:
        return HARM.get(name, f"pip uninstall {name}")
    culprits = [other for other in HARM if outcomes.get(other, Outcome()).reason]
    return f"first see {' and '.join(culprits)}" if culprits else f"pip install --force-reinstall {name}"


def as_text(report: Mapping[str, Any]) -> str:
    """A table for people."""
    torch = report["torch"]
    lines = [f"loraloom {report['loraloom']}, Python {report['python']}, {report['platform']}, {report['cores']} cores"]
    if torch:
        cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "no CUDA"
        threads = counted(torch["threads"], "thread")
        lines.append(f"torch: {', '.join(torch['devices'])}; {threads}; built with {cuda}")
        lines += attention_lines(torch["attention"])
    lines += [
        "",
        f"{'package':14}{'installed':16}{'needs':10}{'state':9}advice",
    ]
    for row in report["packages"]:
        needs = f">={row['floor']}" if row["floor"] else "optional"
        line = f"{row['name']:14}{row['version'] or '-':16}{needs:10}{row['state']:9}{row['advice']}"
        lines.append(line.rstrip())
    for each in report.get("plug-ins", ()):
        problem = f"; {each['problem']}: uninstall all but one" if each["problem"] else ""
        lines.append(f"plug-in: {each['package']} has {each['name']} from {each['from']}{problem}")
    lines += ["", "everything that is required works" if report["ok"] else "something that is required does not work"]
    return "\n".join(lines)
