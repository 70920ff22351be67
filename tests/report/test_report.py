"""Reports: what they say of runs that were written by hand, that nothing is run or loaded from them, and of a sweep."""

import html
import html.parser
import json
import shutil
import subprocess

import pytest

from launch import cli
from launch.sweeps import study
from launch.sweeps.definition import from_data
from lm.report.figures import curves, parallel_coordinates
from lm.report.page import Section, Table, to_html, to_markdown
from lm.report.runs import Run, differing, grouped, spread

EVIL = "<script>alert('x')</script><img src=//evil.example/x>"
SIGNATURE = b"\x89PNG"


def run_of(name, seed=0, rate=0.1, loss=2.0, steps=5, **more):
    rows = [{"step": n, "train/loss": loss + 1 / n, "eval/validation/loss": loss} for n in range(1, steps + 1)]
    return Run(name, {"config.train.seed": seed, "config.optimizer.learning_rate": rate}, rows,
               {"eval/validation/loss": loss, "exit_code": 0, "step": steps}, {}, "", {}, **more)


def write(folder, seed=0, rate=0.1, loss=2.0, sample="good"):
    run = run_of("x", seed, rate, loss)
    (folder / "samples").mkdir(parents=True)
    (folder / "samples/5.txt").write_text(sample)
    (folder / "samples/10.txt").write_text(sample + " later")
    (folder / "config.json").write_text(json.dumps({"train": {"seed": seed}, "optimizer": {"learning_rate": rate}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    (folder / "final_result.json").write_text(json.dumps(run.result))
    (folder / "environment.json").write_text(json.dumps({"command": ["lm", EVIL], "packages": {"jax": "0.10.2"},
                                                         "devices": {"count": 1, "kind": "cpu"}, "python": "3.11"}))
    return folder


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_runs_that_differ_in_seeds_are_one_line_and_others_are_told_apart():
    runs = [run_of("a", 0, 0.1), run_of("b", 1, 0.1), run_of("c", 0, 0.2)]
    assert [(group.label, len(group.runs)) for group in grouped(runs)] == [("learning_rate=0.1", 2),
                                                                           ("learning_rate=0.2", 1)]
    assert differing(runs)["config.optimizer.learning_rate"] == [0.1, 0.1, 0.2]
    assert grouped(runs[:1])[0].runs == runs[:1]
    assert spread([1.0, 3.0]) == "2 ± 1.4" and spread([0.123456]) == "0.1235"


def test_curves_are_pictures_and_runs_without_a_metric_are_none():
    groups = grouped([run_of("a", 0), run_of("b", 1, steps=60), run_of("c", 0, 0.2)])
    assert curves(groups, "loss", "nats").startswith(SIGNATURE)
    assert curves(groups, "loss", "nats", evaluation="validation").startswith(SIGNATURE)
    assert curves(groups, "bits_per_byte", "bits") is None


def test_settings_of_every_kind_have_a_place():
    trials = [({"a.rate": 1e-4, "b.name": "sgd"}, 2.0), ({"a.rate": 1e-2, "b.name": "adamw", "c.m": 3}, 1.0),
              ({"a.rate": 1e-3, "b.name": "sgd", "c.m": None}, 1.5)]
    assert parallel_coordinates(trials, "loss", more=False).startswith(SIGNATURE)
    assert parallel_coordinates(trials[:1], "loss", more=False) is None


def test_a_page_escapes_everything_and_loads_nothing():
    sections = [Section(EVIL, [EVIL, Table([EVIL], [[EVIL]])])]
    tags = Tags(to_html(EVIL, sections))
    assert "script" not in tags.tags and "img" not in tags.tags
    text, _ = to_markdown(EVIL, sections, "files")
    assert "<script" not in text.replace(r"\<", "")


def test_the_command_reports_runs_and_folders_of_runs(tmp_path, capsys):
    for n, rate in enumerate((0.1, 0.1, 0.2)):
        write(tmp_path / f"runs/run{n}", seed=n % 2, rate=rate, loss=2 - rate, sample=EVIL)
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text()
    tags = Tags(page)
    assert "script" not in tags.tags
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in tags.links)
    assert tags.tags.count("img") == 2 and "learning_rate=0.2" in page and "1.9 ± 0" in page and "later" in page
    markdown = (tmp_path / "out/report.md").read_text()
    pictures = list((tmp_path / "out/report_files").iterdir())
    assert len(pictures) == 2 and all(f"report_files/{p.name}" in markdown for p in pictures)
    assert "| optimizer.learning\\_rate | 0.1 | 0.1 | 0.2 |" in markdown


def test_settings_names_and_metrics_that_are_html_are_text(tmp_path):
    """A config value, a folder's name, the name of a metric and the text of an environment, each a tag."""
    write(tmp_path / "runs/<script>one", rate=EVIL)
    other = write(tmp_path / "runs/two", rate=0.1)
    result = json.loads((other / "final_result.json").read_text())
    (other / "final_result.json").write_text(json.dumps({**result, f"eval/{EVIL}/loss": 1.0}))
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, f"eval/{EVIL}/loss": 1.0}) + "\n")
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    tags = Tags(page)
    assert "script" not in tags.tags and all(link.startswith(("data:image/png;base64,", "#")) for link in tags.links)
    assert html.escape(EVIL) in page and html.escape("<script>one") in page
    markdown = (tmp_path / "out/report.md").read_text()
    assert "<script" not in markdown.replace(r"\<", "") and "<img" not in markdown.replace(r"\<", "")


def test_a_run_that_has_just_begun_is_reported_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"seed": 0}}))
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "not begun" in (tmp_path / "report.html").read_text()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no workdir of a run" in capsys.readouterr().err
    assert cli.main(["report"]) == 2 and "needs WORKDIR" in capsys.readouterr().err


def test_a_sweep_is_reported_with_its_trials_and_what_matters(tmp_path):
    definition = from_data({"parameters": {"a.rate": {"low": 0.0, "high": 1.0}, "b.other": [1, 2]}, "trials": 8}, "x")
    definition.write(tmp_path)
    for n in range(8):
        opened = study.open_study(definition, tmp_path)
        trial = opened.ask()
        from launch.sweeps.space import suggest
        values = suggest(trial, definition.space)
        trial.set_user_attr(study.VALUES, values)
        write(tmp_path / f"trials/{n:04d}", rate=values["a.rate"], loss=values["a.rate"])
        opened.tell(trial.number, values["a.rate"])
    assert cli.main(["report", "--study", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert Tags(page).tags.count("img") == 4 and "PED-ANOVA" not in page.split("base64")[0] and "a.rate" in page


@pytest.mark.slow
def test_a_browser_shows_the_page(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    write(tmp_path / "run", sample=EVIL)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    shot = tmp_path / "page.png"
    done = subprocess.run([
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,1600", f"--screenshot={shot}", "--dump-dom", f"file://{tmp_path / 'run/report.html'}"],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert shot.read_bytes().startswith(SIGNATURE) and shot.stat().st_size > 20_000
    assert "Samples" in done.stdout and "<script>" not in done.stdout
