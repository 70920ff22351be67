"""What `lm launch` would run in each place, read back with the tools of that place where they are here."""

import pathlib
import subprocess

import pytest
import yaml

from launch import cli
from launch.places import PLACES, gke, local, sky, slurm, tpu_vm
from launch.places.job import Job, name_of, parse_env, train_words
from launch.sweeps.definition import from_data

CONFIG = ["--config", "experiments/quickstart.py", "--config.train.steps=50"]
WORDS = train_words("experiments/quickstart.py", "gs://b/run_1", [("train.steps", "50")])
BUCKET = Job("run-1", "gs://b/run_1", WORDS, {"A": "x y"})
NEEDS = {"tpu-vm": ["--accelerator=v5e-16", "--zone=us-west4-a"], "gke": ["--accelerator=v5e-16", "--image=i"],
         "sky": ["--accelerator=H100:8"]}


def launch(capsys, place, *flags):
    code = cli.main(["launch", place, *CONFIG, *NEEDS.get(place, []), *flags])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("place", PLACES)
def test_a_dry_run_holds_the_training_command_and_starts_nothing(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, no gcloud, no kubectl
    workdir = "gs://b/run" if place in NEEDS else str(tmp_path / "run")
    code, out, err = launch(capsys, place, "--workdir", workdir, "--dry-run", "--env", "A=1")
    assert (code, err) == (0, "")
    assert f"train --config experiments/quickstart.py --workdir {workdir} --config.train.steps=50" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", NEEDS)
def test_a_local_workdir_on_machines_that_go_away_is_refused(place, capsys):
    code, _, err = launch(capsys, place, "--workdir", "runs/x", "--dry-run")
    assert code == 2 and "a bucket" in err and "--shared-workdir" in err
    assert launch(capsys, place, "--workdir", "/mnt/x", "--shared-workdir", "--dry-run")[0] == 0


@pytest.mark.parametrize("program", ["slurm", "tpu-vm", "gke", "sky"])
def test_a_missing_program_is_named(program, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch(capsys, program, "--workdir", "gs://b/x")
    assert code == 2 and "there is no " in err and "--dry-run" in err


@pytest.mark.parametrize(("place", "flags", "says"), [
    ("slrum", [], "did you mean 'slurm'"), ("local", ["--nodes=2"], "--nodes is for slurm, sky; local takes --proc"),
    ("local", ["--processes=0"], "--processes=0 must be at least 1"), ("local", ["--setup=x"], "--setup is for"),
    ("local", ["--env", "A"], "NAME=VALUE"), ("local", ["--env", "WANDB_API_KEY=1"], "a secret would be written"),
    ("local", ["--name=A_b"], "lower case"), ("local", ["--config.train.stepz=3"], "did you mean"),
    ("slurm", ["--gpus-per-node=8", "--tasks-per-node=3"], "one task a GPU (8)"),
    ("slurm", ["--sbatch=x"], "one option of sbatch"), ("gke", ["--accelerator=v5e-17"], "nearest: "),
    ("gke", ["--accelerator=h100:9"], "1 to 8"), ("sky", ["--accelerator=8"], "H100:8"),
    ("tpu-vm", ["--accelerator=7x-64"], "through GKE only"), ("tpu-vm", ["--spot", "--reserved"], "exclude")])
def test_mistakes_are_found_before_anything_is_queued(place, flags, says, capsys):
    workdir = "gs://b/x" if place in NEEDS else "runs/x"
    code, _, err = launch(capsys, place, "--workdir", workdir, "--dry-run", *flags)
    assert code == 2 and says in err, err


def test_an_absolute_config_is_refused_where_a_copy_of_the_project_runs(capsys):
    code = cli.main(["launch", "sky", "--accelerator=H100", "--workdir=gs://b/x", "--dry-run",
                     f"--config={pathlib.Path('experiments/quickstart.py').absolute()}"])
    assert code == 2 and "from its root" in capsys.readouterr().err


def test_a_missing_workdir_is_named(capsys):
    assert cli.main(["launch", "local", *CONFIG]) == 2 and "needs --workdir" in capsys.readouterr().err


def test_workers_of_a_sweep_are_started_where_its_folder_is(tmp_path, capsys):
    flags = ["--sweep-worker", "--workdir", str(tmp_path)]
    assert cli.main(["launch", "slurm", *flags]) == 2 and "it is no sweep" in capsys.readouterr().err
    from_data({"parameters": {"train.seed": [1, 2]}}, "x").write(tmp_path)
    assert cli.main(["launch", "slurm", *flags, "--array=0-3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"launch.cli sweep worker --workdir {tmp_path}" in out and "#SBATCH --array=0-3" in out
    assert "--vmap" not in out and cli.main(["launch", "slurm", *flags, "--vmap=8", "--dry-run"]) == 0
    assert f"launch.cli sweep worker --workdir {tmp_path} --vmap 8" in capsys.readouterr().out
    for bad in ([*flags, "--vmap=0"], ["--vmap=8", *CONFIG, "--workdir", str(tmp_path / "x")]):
        assert cli.main(["launch", "slurm", *bad, "--dry-run"]) == 2 and "--vmap" in capsys.readouterr().err
    assert cli.main(["launch", "slurm", *flags, "--nodes=2", "--dry-run"]) == 2
    assert cli.main(["launch", "sky", *flags, "--accelerator=H100"]) == 2
    assert cli.main(["launch", "local", *flags, *CONFIG]) == 2


def test_names_fit_every_scheduler():
    assert name_of(None, "gs://b/My_Run.v2/") == "my-run-v2" and name_of(None, "runs/7") == "lm-7"
    assert len(name_of(None, "x" * 90)) <= 40


def test_env_keeps_equals_signs_and_refuses_secrets():
    assert parse_env(["XLA_FLAGS=--a=b --c", "TOKENIZERS_PARALLELISM=0"]) == {
        "XLA_FLAGS": "--a=b --c", "TOKENIZERS_PARALLELISM": "0"}
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "password", "GOOGLE_APPLICATION_CREDENTIALS"):
        with pytest.raises(ValueError, match="secret"):
            parse_env([f"{name}=x"])


@pytest.mark.parametrize("script", [
    slurm.render(BUCKET, slurm.Options(nodes=2, gpus_per_node=8)), tpu_vm.render(BUCKET, tpu_vm.Options(
        accelerator="v5e-16", slices=2, zone="z", spot=True)), local.render(BUCKET, local.Options(processes=2))])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_slurm_asks_for_a_task_a_gpu_and_is_told_before_the_end():
    script = slurm.render(BUCKET, slurm.Options(nodes=2, gpus_per_node=8, time="1:00:00", sbatch=("--exclusive",)))
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00:00", "--exclusive", "--requeue",
                 "--signal=TERM@120"):
        assert f"#SBATCH {line}\n" in script
    assert "export A='x y'\n" in script


def test_tpu_vm_makes_slices_of_that_name_and_starts_on_every_worker():
    script = tpu_vm.render(BUCKET, tpu_vm.Options(accelerator="v4-32", zone="z", project="p", reserved=True))
    assert ("queued-resources create run-1 --node-id run-1 --accelerator-type v4-32 --runtime-version "
            "tpu-ubuntu2204-base --zone z --project p --reserved") in script
    assert "# 16 chips on 4 machines a slice" in script
    two = tpu_vm.render(BUCKET, tpu_vm.Options(accelerator="v4-32", zone="z", slices=2))
    assert "--node-count 2 --node-prefix run-1" in two and "ssh run-1-1 --worker=all" in two


def test_the_script_of_tpu_vms_runs_through_with_a_gcloud_that_only_records(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"""#!/bin/bash
echo "$@" >> {tmp_path}/calls
if [[ "$*" == *describe* ]]; then [ -e {tmp_path}/made ] && echo ACTIVE; fi
if [[ "$*" == *" create "* ]]; then touch {tmp_path}/made; fi
if [ -e {tmp_path}/fail ] && [[ "$*" == *"ssh run-1-1"* ]]; then exit 3; fi
exit 0
""")
    gcloud.chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    script = tpu_vm.render(BUCKET, tpu_vm.Options(accelerator="v5e-16", zone="z", slices=2))

    def run():
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, text=True, capture_output=True,
                              env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)})
    done = run()
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count(" create ") == 1 and calls.count("nohup lm train") == 2 and "follow:" in done.stdout
    assert run().returncode == 0 and (tmp_path / "calls").read_text().count(" create ") == 1  # what is there is taken
    (tmp_path / "fail").touch()
    assert run().returncode == 3  # one machine that cannot be set up ends it


def test_gke_asks_for_the_slice_and_gives_up_on_mistakes():
    made = yaml.safe_load(gke.render(BUCKET, gke.Options(accelerator="v5e-256", image="i", slices=2, queue="q",
                                                         secret="s", service_account="a", spot=True)))
    job = made["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    assert job["replicas"] == 2 and job["template"]["spec"]["completions"] == 64
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
                                   "cloud.google.com/gke-tpu-topology": "16x16", "cloud.google.com/gke-spot": "true"}
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "s"}}]
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    rule = job["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["values"] == [2]


@pytest.mark.parametrize("options", [
    gke.Options(accelerator="v5e-256", image="i", slices=2, queue="q", secret="s", priority="high"),
    gke.Options(accelerator="7x:4x4x4", image="i"), gke.Options(accelerator="h100:8", image="i", slices=4)],
    ids=["v5e", "7x", "h100"])
def test_job_sets_pass_the_published_models(options):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs pip install 'loomlm[test]'")
    given = gke.job_set(BUCKET, options)
    read = models.JobsetV1alpha2JobSet.from_dict(given)
    assert read is not None and subset(given, read.to_dict())
    with pytest.raises(ValueError, match="ReplicatedJob"):
        models.JobsetV1alpha2JobSet.from_dict({**given, "spec": {**given["spec"], "replicatedJobs": "none"}})


def subset(given, whole):
    """Whether every field that we set is one that the model knows and kept."""
    if isinstance(given, dict):
        return all(key in whole and subset(value, whole[key]) for key, value in given.items())
    if isinstance(given, list):
        return len(given) == len(whole) and all(map(subset, given, whole))
    return given == whole


def test_sky_joins_machines_and_recovers_a_run_that_was_told_to_stop():
    made = yaml.safe_load(sky.render(BUCKET, sky.Options(accelerator="H100:8", nodes=2, cloud="gcp", spot=True)))
    assert made["resources"]["job_recovery"]["recover_on_exit_codes"] == [75] and made["num_nodes"] == 2
    assert "JAX_PROCESS_ID=\"$SKYPILOT_NODE_RANK\"" in made["run"] and made["envs"] == {"A": "x y"}
