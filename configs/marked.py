"""Tables that programs write into pages which people wrote: between `<!-- name -->` and `<!-- /name -->`."""

import re

from .errors import UserError


def fill_marked(page: str, name: str, table: str) -> str:
    """The page with `table` in its place. UserError where it has no such place."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if not re.search(f"{begin}.*{end}", page, re.DOTALL):
        raise UserError(f"the page has no place for the table: it needs {begin} and, after it, {end}")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}{end}", page, count=1, flags=re.DOTALL)
