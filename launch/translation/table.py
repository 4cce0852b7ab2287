"""The tables of docs/from-other-trainers.md, from the rules: python -m loraloom.launch.translation.table"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from ...configs.choices import find, names
from .peer import PEERS, Rule

HEAD = {
    "Carried over": ("| there | here |", "|---|---|"),
    "Not quite the same": ("| there | here | what differs |", "|---|---|---|"),
    "Nothing to set": ("| there | why |", "|---|---|"),
    "Not here": ("| there | why |", "|---|---|"),
}


def tables() -> str:
    """Of all tools."""
    return "\n".join(line for name in names(PEERS) for line in _tool(find(PEERS, name)))


def _tool(peer: object) -> Iterator[str]:
    rules: Mapping[str, Rule] = getattr(peer, "RULES")  # noqa: B009  (a module of which only this is asked)
    for title, head in HEAD.items():
        yield f"\n### {getattr(peer, 'NAME')}: {title[0].lower()}{title[1:]}\n"  # noqa: B009
        yield from head
        yield from _rows({name: rule for name, rule in rules.items() if _title(rule) == title})


def _title(rule: Rule) -> str:
    if rule.is_lost:
        return "Not here"
    if rule.words:
        return "Not quite the same" if rule.ours else "Nothing to set"
    return "Carried over"


def _rows(rules: Mapping[str, Rule]) -> Iterator[str]:
    """Settings with the same answer share a row."""
    alike: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, rule in rules.items():
        alike[rule.ours, rule.words].append(name)
    for (ours, words), found in alike.items():
        yield f"| {' | '.join(cell for cell in (_code(found), _code([ours] if ours else []), words) if cell)} |"


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    print(tables())
