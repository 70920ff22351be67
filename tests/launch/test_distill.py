"""`lm distill`: what is written is what the teacher predicts, at the places where the student learns it."""

import json

import jax
import numpy as np
import pytest

from launch import cli
from launch import config as configs
from launch.distill import check_teacher
from launch.restore import open_run
from lm.core.batch import TaughtBatch
from lm.core.head import logits_of
from lm.data.corpora import load_corpora
from lm.data.loader import build_dataset
from lm.tasks.language_modeling import forward

MODEL = dict(embed_dim=16, num_layers=1, pattern=("attention/mlp",), attention=dict(num_heads=2), mlp=dict(mlp_dim=32),
             dtype="float32", vocab_size=257)
K, HEAT = 4, 2.0


def lm(*words):
    return cli.main([str(word) for word in words])


def config(folder, **data):
    return dict(model=MODEL, data=dict(source="array_record", path=str(folder / "chats"), **data),
                optimizer=dict(learning_rate=1e-2, schedule="constant", warmup_steps=0),
                train=dict(steps=2, batch_size=8, seq_len=64), eval=dict(every=1000, final=False, baseline=False),
                log=dict(every=1, tensorboard=False))


def write(path, made):
    path.write_text(configs.to_json(configs.resolve(made)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared chats, a teacher of thirty steps, and its predictions in `taught`."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "chats.jsonl").write_text("".join(json.dumps(
        {"prompt": f"{i}+{i}?", "completion": f"it is {2 * i}" + "!" * (i % 4)}) + "\n" for i in range(40)))
    assert lm("data", "prepare", "--kind", "chat", "--source", "jsonl", "--path", folder / "chats.jsonl", "--template",
              "plain", "--tokenizer", '{"kind": "bytes", "eos_id": 256}', "--out", folder / "chats") == 0
    made = config(folder) | {"train": config(folder)["train"] | {"steps": 30}}
    assert lm("train", "--config", write(folder / "t.json", made), "--workdir", folder / "teacher") == 0
    assert lm("distill", "--workdir", folder / "teacher", "--data", folder / "chats", "--out", folder / "taught",
              "--top-k", K, "--temperature", HEAT, "--batch-size", 8) == 0
    return folder


def taught(folder, **fields):
    return build_dataset({"source": "array_record", "path": str(folder / "chats"), "teacher": str(folder / "taught"),
                          "validation_fraction": 0.2, **fields}, batch_size=8, seq_len=64, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["first_fit", "single"])
def test_batches_bring_what_the_teacher_predicts_at_every_target(folder, packing):
    """Whatever the packing and the order of the rows: documents do not see each other."""
    run, made = open_run(str(folder / "teacher")), taught(folder, packing=packing)

    @jax.jit
    def heated(params, batch):
        out = forward(run.apply, params, batch)
        return jax.nn.log_softmax(logits_of(out.hidden, out.head) / HEAT, -1)

    for step in range(2):
        batch = made.batch(step)
        assert isinstance(batch, TaughtBatch) and batch.teacher_ids.shape == (8, 64, K)
        with jax.set_mesh(run.mesh):
            want = np.asarray(heated(run.params, type(batch)(*batch)))
        counted = batch.weights > 0
        assert counted.sum() > 20
        named = np.take_along_axis(want, batch.teacher_ids, -1)[counted]
        found = batch.teacher_logp[counted]
        np.testing.assert_allclose(found[:, :K], named, atol=2e-5)
        np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, atol=1e-5)
        best = -np.sort(-want, -1)[..., :K][counted]
        np.testing.assert_allclose(found[:, :K], best, atol=2e-5)


@pytest.mark.slow
def test_a_student_learns_from_it_and_its_loss_falls(folder):
    made = config(folder, teacher=str(folder / "taught")) | {
        "loss": {"distill": {"weight": 0.9, "temperature": HEAT}, "next_token": 0.1}}
    made["train"] = made["train"] | {"steps": 30, "seed": 1}
    assert lm("train", "--config", write(folder / "s.json", made), "--workdir", folder / "student") == 0
    rows = [json.loads(line) for line in (folder / "student/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/distill"] for row in rows if "train/distill" in row]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_validation_rows_bring_no_teacher(folder):
    corpora = load_corpora({"source": "array_record", "path": str(folder / "chats"), "teacher": str(folder / "taught"),
                            "validation_fraction": 0.2})
    held = build_dataset({"source": "array_record", "path": str(folder / "chats"), "validation_fraction": 0.2},
                         split="validation", batch_size=8, seq_len=64, corpora=corpora)
    assert not isinstance(held.batch(0), TaughtBatch) and not isinstance(next(held.eval_batches()), TaughtBatch)


@pytest.mark.slow
def test_other_data_and_other_tokenizers_are_refused(folder, tmp_path, capsys):
    assert lm("data", "prepare", "--source", "pydoc", "--out", tmp_path / "text", "--tokenizer", "bytes") == 0
    with pytest.raises(ValueError, match="are for other data"):
        build_dataset({"source": "array_record", "path": str(tmp_path / "text"), "teacher": str(folder / "taught")},
                      batch_size=8, seq_len=64)
    ranks = tmp_path / "small.tiktoken"
    import base64
    ranks.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    assert lm("data", "prepare", "--source", "pydoc", "--out", tmp_path / "other", "--tokenizer",
              f"tiktoken:{ranks}") == 0
    capsys.readouterr()
    assert lm("distill", "--workdir", folder / "teacher", "--data", tmp_path / "other", "--out", tmp_path / "x") == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err


class Given:
    def __init__(self, temperature):
        self.teacher = None if temperature is None else self
        self.temperature = temperature


@pytest.mark.parametrize(("loss", "temperature", "message"), [
    ({"distill": {"temperature": 1.0}}, None, "names none; make them with `lm distill`"),
    ({"next_token": 1.0}, 1.0, "predictions that no loss uses"),
    ({"distill": {"temperature": 1.0}}, 2.0, "are of temperature 2.0"),
])
def test_loss_and_data_agree_on_the_teacher(loss, temperature, message):
    with pytest.raises(ValueError, match=message):
        check_teacher(loss, Given(temperature))
    check_teacher({"distill": {"temperature": 2.0}}, Given(2.0))
    check_teacher({"next_token": 1.0}, Given(None))


@pytest.mark.parametrize(("flags", "message"), [
    ([], "needs --workdir TEACHER"),
    (["--workdir", "x", "--data", "y", "--out", "z", "--top-k", "0"], "must be at least 1"),
])
def test_mistakes_are_one_line(capsys, flags, message):
    assert lm("distill", *flags) == 2
    assert message in capsys.readouterr().err
