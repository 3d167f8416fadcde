"""Eight virtual CPU devices and strict dtype promotion for every test."""

import os
from importlib.metadata import version

# Tests run each program only a few times, so compiling must be quick (and once per machine).
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Later ones refuse it.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.12" else "")
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moe_jax/test_xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import contextlib
from pathlib import Path

# If PyTorch's default wheels are installed, load them before TensorFlow. Otherwise importing Triton
# crashes the process, and PyTorch warns that CUDA is broken.
with contextlib.suppress(ImportError):
    import torch  # noqa: F401
    import triton  # noqa: F401

import gin
import jax
import pytest

from moe_jax.data import modules

jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).resolve().parent.parent
# Tables made by tests in any process, printed at the end.
TABLES = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[TABLES] = []


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = session.config.stash[TABLES]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    node.config.stash[TABLES] += getattr(node, "workeroutput", {}).get("tables", [])


def pytest_terminal_summary(terminalreporter):
    for table in terminalreporter.config.stash[TABLES]:
        terminalreporter.write_line(f"\n{table}")


@pytest.fixture(autouse=True)
def no_gin_bindings():
    """Clears gin after every test, and which modules a command was given."""
    yield
    gin.clear_config()
    modules._given, modules._run = None, ("", {})


def _shared(variable: str, name: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not path.is_dir():
        pytest.skip(f"{variable} names no directory and {path} is absent")
    return path


@pytest.fixture(scope="session")
def gym() -> Path:
    """Directory of real tasks in CrossFit's layout (`crossfit/`, `full/`, `partitions/`)."""
    return _shared("MOE_JAX_GYM", "gym")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Directory of numbers produced by the published PyTorch code."""
    return _shared("MOE_JAX_FIXTURES", "fixtures")


@pytest.fixture(scope="session")
def bucket_server():
    """An emulated bucket. Clients keep the address that they first had: so it is one for all."""
    pytest.importorskip("gcsfs", reason="buckets need gcsfs: the extra `gcs`")
    pytest.importorskip("gcp_storage_emulator", reason="the emulator is in the extra `test`")
    from bucket_server import Bucket

    server = Bucket()
    yield server
    server.stop()


@pytest.fixture
def bucket(bucket_server, monkeypatch):
    """The bucket, to which this process's environment leads."""
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    return bucket_server


@pytest.fixture
def top(bucket, request, tmp_path, monkeypatch) -> str:
    """A test's own directory of the bucket; copies of buckets are in its temporary directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return f"gs://toys/{request.node.name.split('[')[0]}"
