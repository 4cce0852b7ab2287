"""Counts with their nouns, as people read them."""


def counted(count: int, noun: str) -> str:
    """'1 step', '1,200 steps', '2 batches', '2 entries'; the last word of `noun` is the one that changes."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Of a regular noun."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else f"{noun}s"
