"""loraloom push RUN --repo OWNER/NAME: files, model card and its pictures to the Hugging Face hub, and nothing else."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.arguments import Parser, path_text
from ..configs.command import run_command
from ..configs.errors import AFTER_TRAINING, AfterTrainingError, UserError
from ..configs.plain import plain
from ..configs.record import NAME as RECORD
from ..configs.words import counted
from .facts import at
from .footprint import CARD
from .pages.usage import REPOSITORY
from .run_folder import RunFiles, read_run, write_run_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from .run import Run

HELP = """\
Upload a finished run to the Hugging Face hub, in one commit: its adapter files, or its pipeline folder, the
model card README.md, and the pictures that the card shows. Checkpoints, logs and the config stay here."""
LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to."""

    repository: str  # OWNER/NAME
    branch: str | None = None
    private: bool = False  # whether a repository that has to be made is private
    never_public: bool = False  # whether one that is there already has to be private, too


@dataclass(frozen=True, slots=True)
class Upload:
    """One file."""

    name: str  # in the repository
    file: Path

    @property
    def size(self) -> int:
        return self.file.stat().st_size


def main(arguments: Sequence[str]) -> int:
    """Lists the files and uploads them; exit code 6 where the hub is out of reach or refuses."""
    options = _parser().parse_args(list(arguments))
    run = read_run(Path(options.run))
    uploads = uploads_of(run)
    print("\n".join(_listed(uploads)))
    if options.dry_run:
        return 0
    repository = options.repo or at(run.config, "output.push_to")
    if repository is None:
        raise UserError("--repo: which repository on the hub? Such as --repo OWNER/NAME")
    target = Target(repository, options.branch, private=options.private, never_public=options.private)
    print(f"pushed: {push(target, uploads, _message(run))}")
    return 0


def push_finished(run: "Run", repository: str) -> None:
    """At the end of a training run: what becomes of it is in run.json, whose state stays `done`."""
    try:
        files = read_run(run.folder)
        url = push(Target(repository, private=True), uploads_of(files), _message(files))
    except UserError as error:
        words = f"trained, verified and written, but not pushed: {error}"
        write_run_file(run, exit_code=AFTER_TRAINING, message=words, push=f"failed: {error}")
        raise AfterTrainingError(words) from error
    write_run_file(run, push=url)
    print(f"pushed: {url}")


def uploads_of(run: RunFiles) -> list[Upload]:
    """What belongs on the hub: written files, the card, and the pictures that it shows.

    UserError for a run that is not done, and for a file that is not there.
    """
    state = run.record.get("state") or "unknown"
    if state != "done":
        raise UserError(f"{run.folder}: a run can be pushed when it is done and verified, its state is {state}")
    card = run.folder / CARD
    if not card.is_file():
        from .pages.card import write_card

        write_card(run.folder)
    paths = [run.folder / Path(name).name for name in run.record.get("files") or []]
    wanted = [*(upload for path in paths for upload in _below(path)), Upload(CARD, card), *_pictures(run.folder)]
    if missing := [str(upload.file) for upload in wanted if not upload.file.is_file()]:
        raise UserError([f"{file}: is not there" for file in missing])
    return wanted


def push(target: Target, uploads: Sequence[Upload], message: str) -> str:
    """Uploads all of it in one commit and answers with its address; what lies here stays as it is.

    Raises:
        AfterTrainingError: in one line, where the hub is out of reach or refuses.
        UserError: for a name that no repository can have, and for a public one where it has to be private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    if token() is None:
        raise AfterTrainingError(f"the hub takes no files from strangers: {LOG_IN}")
    try:
        return _commit(HfApi(), target, uploads, message)
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"--repo {target.repository}: {_first_line(error)}") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of what uploads large files, hf_xet
        raise AfterTrainingError(_explain(error, target.repository)) from error


def token() -> str | None:
    """The one that the hub's own tools use."""
    from huggingface_hub import get_token

    return get_token()


def _commit(api: "HfApi", target: Target, uploads: Sequence[Upload], message: str) -> str:
    from huggingface_hub import CommitOperationAdd

    api.create_repo(target.repository, private=target.private or None, exist_ok=True)
    if target.never_public and not api.model_info(target.repository).private:
        words = "is there already and is public; make it private on the hub, or leave out --private"
        raise UserError(f"--private: {target.repository} {words}")
    if target.branch is not None:
        api.create_branch(target.repository, branch=target.branch, exist_ok=True)
    operations = [CommitOperationAdd(each.name, _content(each, target.repository)) for each in uploads]
    return api.create_commit(target.repository, operations, commit_message=message, revision=target.branch).commit_url


def _content(upload: Upload, repository: str) -> bytes | str:
    """The file itself; in the card, the repository has a name now."""
    if upload.name != CARD:
        return str(upload.file)
    return upload.file.read_text("utf-8").replace(REPOSITORY, repository).encode()


def _below(path: Path) -> Iterator[Upload]:
    """A file, or all files of a pipeline folder, which becomes the root of the repository."""
    if not path.is_dir():
        yield Upload(path.name, path)
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != RECORD:
            yield Upload(file.relative_to(path).as_posix(), file)


def _pictures(folder: Path) -> Iterator[Upload]:
    """Those in the run folder that the card shows, in its text or in its gallery."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(folder / CARD)
    except ValueError as error:
        raise UserError(f"{folder / CARD}: its head cannot be read ({_first_line(error)})") from error
    shown = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", card.text)
    shown += [(each.get("output") or {}).get("url") or "" for each in card.data.get("widget") or []]
    for name in dict.fromkeys(shown):
        file = folder / name
        if file.suffix.lower() in PICTURES and "://" not in name and file.resolve().is_relative_to(folder.resolve()):
            yield Upload(name, file)


def _listed(uploads: Sequence[Upload]) -> Iterator[str]:
    for upload in uploads:
        yield f"{_megabytes(upload.size)}  {plain(upload.name)}"
    yield f"{_megabytes(sum(upload.size for upload in uploads))}  in {counted(len(uploads), 'file')}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:12,.3f} MB"


def _message(run: RunFiles) -> str:
    return f"{at(run.config, 'output.name')}, trained for {run.record.get('step')} steps with loraloom"


def _explain(error: Exception, repository: str) -> str:
    """What went wrong and what to do, in one line, without the token, which an answer may repeat."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    reason = _first_line(said).replace(token() or "\0", "(token)")
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off here: unset HF_HUB_OFFLINE"
    if status == 401:
        return f"the hub does not know the token that is used here ({reason}): {LOG_IN}"
    if status in (403, 404):
        return f"the token that is used here may not write to {repository} ({reason}): {LOG_IN}"
    if status is not None:
        return f"the hub refused it (status {status}: {reason})"
    if isinstance(error, ValueError):
        return f"the hub refused it: {' '.join(said.split())}"
    return f"the hub cannot be reached ({reason}): try again with `loraloom push`"


def _first_line(said: object) -> str:
    return (str(said).strip() or type(said).__name__).splitlines()[0]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="loraloom push", description=HELP)
    parser.add_argument("run", type=path_text, help="run folder")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="repository; output.push_to of the run when not given")
    parser.add_argument("--private", action="store_true", help="make it private, and refuse one that is public")
    parser.add_argument("--revision", dest="branch", metavar="BRANCH", help="branch; made if there is none")
    parser.add_argument("--dry-run", action="store_true", help="list the files with their sizes and end")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
