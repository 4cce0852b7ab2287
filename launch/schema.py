"""`loraloom schema`: the JSON schema of a config, which editors use to complete and check YAML files."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..configs.arguments import Parser, a_path
from ..configs.errors import UserError
from ..configs.loader import json_schema
from ..configs.ownership import write_file


def schema_text() -> str:
    """What `configs/schema.json` holds."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Print the schema, or write it to a file."""
    parser = Parser("loraloom schema", description="Print the JSON schema of a config.")
    parser.add_argument("--out", type=a_path, metavar="FILE", help="write it to this file")
    out: Path | None = parser.parse_args(arguments).out
    if out is None:
        print(schema_text(), end="")
        return 0
    try:
        write_file(out, schema_text(), by="schema")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    print(f"{out}: use it in a YAML file with the line  # yaml-language-server: $schema={out}")
    return 0
