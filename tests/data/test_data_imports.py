"""Data code runs in workers and on hosts without a device: it must not need JAX."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_data_package_works_where_jax_cannot_be_imported():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT / "lm/data").rglob("*.py"))
               if p.stem != "__init__"]
    # grain itself imports jax where there is one, so its absence is what shows that we do not need it.
    code = f"""
import importlib, sys
sys.modules["jax"] = None
for name in {modules!r}:
    importlib.import_module(name)
from lm.data.loader import build_dataset, iterate
data = build_dataset(dict(source="pydoc"), batch_size=2, seq_len=16)
batches = iterate(data, 3)
step, batch = next(batches)
batches.close()
assert step == 3 and batch.tokens.shape == (2, 16)
assert not any(name == "jax" or name.startswith("jax.") for name, m in sys.modules.items() if m is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
