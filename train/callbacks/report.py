"""report.html of the run folder, made anew at the end (also of a run that was stopped)."""

from ...configs.progress import say
from ..callback import Callback
from ..journal import tolerated
from ..pages.report import write_report
from ..run import Run


class Report(Callback):
    """Last of all: it reads what the others have written."""

    def on_end(self, run: Run) -> None:
        if run.is_main:
            with tolerated("report.html"):
                say(f"wrote {write_report(run.folder)}")
