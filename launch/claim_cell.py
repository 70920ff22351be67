"""One cell of a claim, in a process of its own: `python -m launch.claim_cell FOLDER MEASURE`.

FOLDER holds config.json, the resolved config. The process trains in FOLDER/run, or measures, and writes what came out
to FOLDER/values.json; stages.json, where it stands there, says what is trained after that. Its exit code is that of
`lm train`; a run that was cut short goes on from its last checkpoint.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from launch.config_workdir import write_text

VALUES_FILE, CONFIG_FILE, STAGES_FILE, RUN = "values.json", "config.json", "stages.json", "run"


def train(folder: pathlib.Path, config: str = CONFIG_FILE, run: str = RUN, init_from: str | None = None
          ) -> tuple[int, dict[str, float]]:
    """(exit code, numbers) of `lm train`: the last row of metrics and evaluations, `num_params`, and `state_bytes` of
    one row of `train.seq_len` tokens."""
    from launch import config as configs
    from launch import train as command
    code = command.main(argparse.Namespace(
        config=str(folder / config), workdir=str(folder / run), overrides=[], profile=None, init_from=init_from,
        allow_config_change=False))
    if code:
        return code, {}
    result = json.loads((folder / run / "final_result.json").read_text())
    values = {name: float(value) for name, value in result.items() if value is not None}
    return code, values | sizes(configs.load(str(folder / config)))


def sizes(config: Any) -> dict[str, float]:
    """`num_params` and `state_bytes` of the config's model."""
    from launch import config as configs
    from lm.claims.measures.decode_cost import state_bytes
    from lm.core.tree import num_params
    from lm.data.corpora import load_tokenizer
    from lm.models.build import abstract_params, build_model
    model = build_model(config.model.to_dict(), load_tokenizer(configs.options(config, "data")).vocab_size)
    return {"num_params": num_params(abstract_params(model)), "state_bytes": state_bytes(model, config.train.seq_len)}


def main(argv: list[str]) -> int:
    """Runs the cell; returns the exit code."""
    from launch import config as configs
    from launch.console import set_up_logging
    folder, measure = pathlib.Path(argv[0]), argv[1]
    set_up_logging()
    if (folder / STAGES_FILE).exists():
        from launch.claim_stages import train_stages
        code, values = train_stages(folder, json.loads((folder / STAGES_FILE).read_text()))
    elif measure == "train":
        code, values = train(folder)
    else:
        from lm.claims.measures import MEASURES
        code, values = 0, MEASURES[measure](configs.load(str(folder / CONFIG_FILE)))
    if code == 0:
        from etils import epath
        write_text(epath.Path(folder / VALUES_FILE), json.dumps(values) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
