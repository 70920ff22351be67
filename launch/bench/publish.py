"""What a benchmark leaves: its numbers as JSON, its table as Markdown, and the table on the terminal."""

import json
import os
import pathlib
from typing import Any


def publish(out: str | os.PathLike, name: str, result: dict[str, Any], table: str) -> int:
    """Writes <out>/<name>.json and <name>.md, and prints the table. Exit code 0."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table)
    return 0
