"""README.md of the run folder, the model card, once the files are written and verified."""

from ...configs.errors import AfterTrainingError
from ...configs.progress import say
from ..callback import Callback
from ..footprint import CARD
from ..pages.card import write_card
from ..run import Run


class Card(Callback):
    """Behind the export, of whose record it is made; a run that was stopped has no files to describe."""

    def on_end(self, run: Run) -> None:
        if run.is_main and not run.stop:
            try:
                card = write_card(run.folder)
            except OSError as error:
                raise AfterTrainingError(f"the files are written, the model card cannot be: {error}") from error
            say(f"wrote {card}" if card else f"left {run.folder / CARD} as it is: it is not one of ours")
