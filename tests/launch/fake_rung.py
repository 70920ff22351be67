"""Stands in for `launch.claim_cell` in tests of `lm scale`: a loss by the law 1 + 20 N^-0.3 (1 + seed / 1000), in
milliseconds. A file <cell>.fails in the workdir makes it fail with the exit code that stands there."""

import json
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
workdir = folder.parent.parent
with open(folder / "starts.txt", "a") as file:
    file.write("x")
fails = workdir / f"{folder.name}.fails"
if fails.exists():
    print("first line\nthe loss went away")
    sys.exit(int(fails.read_text()))
width, train = config["model"]["embed_dim"], config["train"]
tokens = train["steps"] * train["batch_size"] * train["seq_len"]
# Attention and MLP of two layers, norms, and the tied table of 256 bytes.
params = 2 * (4 * width**2 + 2 * 32 * width + 2 * width) + width + 256 * width
loss = 1 + 20 * params**-0.3 * (1 + train["seed"] / 1000) + 300 * tokens**-0.6 * (len(sys.argv) > 3)
(folder / "values.json").write_text(json.dumps({"eval/validation/loss": loss, "tokens": tokens, "params": params}))
