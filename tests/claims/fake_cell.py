"""Stands in for `launch.claim_cell`: a process that takes milliseconds. A file <cell>.fails beside the cells makes it
fail with the exit code that stands there."""

import json
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
fails = folder.parent.parent / f"{folder.name}.fails"
with open(folder / "starts.txt", "a") as file:
    file.write("x")
if fails.exists():
    print("first line\nbroken on purpose")
    sys.exit(int(fails.read_text()))
score = float(folder.name.startswith("good")) + 0.01 * config["train"]["seed"]
(folder / "values.json").write_text(json.dumps({"score": score}))
