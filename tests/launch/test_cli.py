"""The command `loraloom`, as a person runs it."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraloom.configs.choices import names
from loraloom.configs.errors import UserError
from loraloom.inference.adapter import __main__ as adapter
from loraloom.launch import cli


def loraloom(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraloom.launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_teaches_and_is_quick() -> None:
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        done = loraloom("--help")
        best = min(best, time.perf_counter() - start)
        if best < 0.2:
            break
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in cli.VERBS)
    assert "loraloom train my-dog.yaml" in done.stdout
    assert best < 0.2


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from loraloom.launch.cli import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "yaml", "pydantic", "argparse", "difflib"} & set(done.stderr.split())


def answer(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """What the command says, and which heavy libraries it imports for that."""
    told = "atexit.register(lambda: print(*sys.modules))"
    code = f"import atexit, sys; from loraloom.launch.cli import main; {told}; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    return done, {"torch", "numpy", "PIL", "pyarrow"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    done, heavy = answer(verb, "--help")
    assert "usage: loraloom" in done.stdout
    assert (done.returncode, heavy) == (0, set())


@pytest.mark.parametrize("verb", ["plan", "preview", "cache", "train", "replay"])
def test_a_typo_in_a_config_is_answered_with_nothing_heavy(verb: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("loop: {stepz: 5}\n")
    done, heavy = answer(verb, *([str(tmp_path), "--step", "1"] if verb == "replay" else [str(config)]))
    assert "loop.stepz: unknown key" in done.stderr
    assert (done.returncode, heavy) == (2, set())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample --prompt x --adapter no.safetensors", "no.safetensors: no such file in "),
        ("sample --prompt x --base ./no", "base './no': there is no such folder in "),
        ("sample --prompt x --adapter a.safetensors:abc", "a.safetensors:abc: weight 'abc' is no number"),
        ("sample --prompt x --steps 0", "argument --steps: 0 is not at least 1 (see loraloom sample --help)"),
        ("sample no.yaml", "no.yaml: "),
        ("grid --prompt x --x checkpoint no", "no: no such file in "),
        ("grid --prompt x --x weight zero --adapter a.safetensors", "axis weight: 'zero' is no weight"),
        ("adapter inspect no.safetensors", "no.safetensors: there is no such file in "),
        ("adapter merge a.safetensors:abc --out x", "a.safetensors:abc: weight 'abc' is no number"),
        ("adapter convert a.safetensors --to kohia", '--to kohia: is no format (did you mean "kohya"?)'),
        ("adapter resize a.safetensors --rank none", "argument --rank: "),
        ("adapter extract ./no owner/name@main --rank 4", "the commit of a hub id is given apart"),
        ("adapter verify a.safetensors --base a/..", "base 'a/..': "),
        ("convert no.safetensors --out x", "base 'no.safetensors': there is no such file in "),
    ],
)
def test_what_is_wrong_with_arguments_is_answered_with_nothing_heavy(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors").touch()
    done, heavy = answer(*words.split())
    assert said in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert (done.returncode, heavy - {"PIL"}) == (2, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


def test_no_verb_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "usage: loraloom VERB" in capsys.readouterr().out


def test_version() -> None:
    assert loraloom("--version").stdout.startswith("loraloom 0.")


def test_unknown_verb_is_answered_with_the_nearest() -> None:
    done = loraloom("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'trian' is no verb (did you mean \"train\"?); there are: init, ")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_a_module_that_is_there(verb: str) -> None:
    assert importlib.util.find_spec(cli.VERBS[verb].module)


def test_the_verbs_of_adapter_are_its_modules() -> None:
    assert [*adapter.VERBS] == names("inference.adapter")


def test_verbs_get_their_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schema"]) == 0
    assert '"extends"' in capsys.readouterr().out


def test_resume_asks_for_a_run_that_exists() -> None:
    with pytest.raises(UserError, match="resume which run"):
        cli.run(["resume"])
    done = loraloom("resume", "nowhere")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "run folder" in done.stderr


def test_interrupt_is_one_line() -> None:
    code = (
        "import sys, signal; from loraloom.launch import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job of a shell ignores it
        "sys.argv = ['loraloom', '--help']\n"
        "class Pipe:\n"
        "    def write(self, text): signal.raise_signal(signal.SIGINT)\n"
        "    def flush(self): pass\n"
        "sys.stdout = Pipe()\n"
        "sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def said_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The help that a command prints."""
    with pytest.raises(SystemExit) as ended:
        cli.run(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample --prompt x --width 64 --height 64", "--width --height 64; here it is --resolution WIDTHxHEIGHT"),
        ("sample --prompt x --cfg_scale=3", "here it is --guidance (see"),
        ("grid --x seed 1 --sampler euler", "here it is --scheduler (see"),
        ("sample --promt x", '(did you mean "--prompt"?)'),
        ("init --data . --num_images 3", "unrecognized arguments: --num_images 3 (see"),  # none like it
        ("train x.yaml --steps 3", "--steps 3; settings are written key=value, such as loop.steps=500 (see"),
        ("train x.yaml --overwritte", '(did you mean "--overwrite"?)'),
    ],
)
def test_options_of_others_and_slips_are_answered(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(words.split())
    assert said in capsys.readouterr().err


def test_help_of_a_verb_by_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert said_by(capsys, "help", "adapter", "merge") == said_by(capsys, "adapter", "merge", "--help")
    assert said_by(capsys, "adapter", "help", "merge") == said_by(capsys, "adapter", "merge", "--help")
    with pytest.raises(UserError, match="'trian' is no verb"):
        cli.run(["help", "trian"])
    assert said_by(capsys, "help", "train") == said_by(capsys, "train", "--help")
    resume = said_by(capsys, "resume", "--help")
    assert resume.startswith("usage: loraloom resume") and "run folder" in resume
    assert "--overwrite" not in resume
    assert cli.run(["help"]) == 0


def test_only_the_config_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "plan"):
        with pytest.raises(SystemExit):
            cli.run([verb])
        assert "required: config (see" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["init"], ["train"], ["sample"], ["grid"], ["convert"], ["adapter", "convert"], ["adapter", "merge"]]
)
def test_one_word_for_writing_over_is_as_good_as_the_other(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_by(capsys, *words, "--help")
    assert "--force" in said and "--overwrite" in said


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "loraloom", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("loraloom ")
