"""New words of a prompt: where one begins and ends."""


def is_plain_word(word: str) -> bool:
    """Whether it ends only where other letters do: `sks` is no part of `asks`, but `<sks>` is found anywhere."""
    return all(letter.isascii() and (letter.isalnum() or letter == "_") for letter in (word[0], word[-1]))
