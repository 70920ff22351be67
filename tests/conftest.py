"""Eight fake CPU devices for every test, and the fixtures that several folders share."""

import atexit
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `lm` sets it: LAPACK runs in XLA's threads
flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
# Tests compile much and compute little: without LLVM's optimisations they take half the time, and without MLIR's for
# each fusion, where this XLA still has a way around them, half of that again.
flags += ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
# One compile cache for all worker processes of this run, and never the user's own.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="loomlm-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import time  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# A machine that is busy for a moment is no defect. A change is judged by the same examples each time; others are drawn
# wherever else the tests run.
hypothesis.settings.register_profile("loomlm", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("loomlm")

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data beside the checkout; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real test data in {folder.name}/ beside the checkout")
    return folder


@pytest.fixture(scope="session")
def python_with_libtpu() -> str:
    """A python that compiles for TPUs."""
    return python_with("libtpu", "LOOMLM_TEST_LIBTPU_PYTHON", "loomlm[aot]")


@pytest.fixture(scope="session")
def python_with_cuda() -> str:
    """A python that compiles for NVIDIA GPUs."""
    return python_with("jax_cuda13_plugin", "LOOMLM_TEST_CUDA_PYTHON", "loomlm[aot-gpu]")


def python_with(package: str, variable: str, extra: str) -> str:
    """This interpreter if it has the package, else the one that the variable names; skips where there is neither."""
    if importlib.util.find_spec(package):
        return sys.executable
    if variable not in os.environ:
        pytest.skip(f"needs pip install '{extra}', or {variable} set to a python that has it")
    return os.environ[variable]


def pytest_addoption(parser):
    parser.addoption("--time-budget", type=float, default=None, metavar="SECONDS",
                     help="skip every test that would start later than this; the summary lists them")


def pytest_configure(config):
    config.started = time.monotonic()


OUT_OF_TIME = "not run: the time budget is spent"


def pytest_runtest_setup(item):
    budget = item.config.getoption("--time-budget")
    if budget is not None and time.monotonic() - item.config.started > budget:
        pytest.skip(OUT_OF_TIME)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    left = [report.nodeid for report in skipped if OUT_OF_TIME in str(report.longrepr)]
    if left:
        terminalreporter.section(f"{len(left)} tests were not run for lack of time")
        terminalreporter.write_line("\n".join(left))
