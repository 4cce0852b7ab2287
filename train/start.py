"""The processes of a launcher, brought together before anything is looked at; torch comes only if there are several."""


def start_processes() -> None:
    """What is wrong is then said once, by one of them."""
    from .together import start_processes

    start_processes()
