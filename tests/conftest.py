"""The environment of every test: folders of the session's own, and Triton's interpreter where no GPU is.

The variables are set here because torch, Triton and platformdirs read them at their import or their first use. The
workers of pytest-xdist and the children of tests inherit them, so a kernel is compiled once in a session.
"""

import atexit
import functools
import json
import logging
import os
import random
import shutil
import signal
import site
import sys
import tempfile
import uuid
from pathlib import Path

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
FOLDERS = {
    "HOME": "home",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "XDG_STATE_HOME": "state",
    "TRITON_HOME": "home",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "HF_HOME": "huggingface",
    "DASK_CONFIG": "config/dask",
}


def _enclose():
    """Point every user's folder into one of this session's, which goes when the session ends."""
    folder = tempfile.mkdtemp(prefix="int8kit-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())  # else it would follow HOME, with what is installed
    os.environ.update({name: str(Path(folder, below)) for name, below in FOLDERS.items()})
    os.environ["INT8KIT_TEST_SESSION"] = folder


if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has its controller's
    _enclose()
SESSION = Path(os.environ["INT8KIT_TEST_SESSION"])
GROUPS = SESSION / "groups.json"
os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))  # more would wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# a loaded machine is no fault, and what failed in an earlier run must not decide this one
settings.register_profile("tests", deadline=None, database=None)
settings.load_profile("tests")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and the children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_long(item):
    """Whether a test is marked long, or compiles kernels for the present GPU."""
    if "gpu" in item.path.parts and torch.cuda.is_available():
        return True
    return any(item.get_closest_marker(name) for name in ("slow", "process"))


def _group(item):
    """What runs in one worker of pytest-xdist: a marked group, a long test by itself, or the rest of a module."""
    if mark := item.get_closest_marker("xdist_group"):
        return mark.args[0]
    return item.nodeid if _is_long(item) else item.path.stem


def pytest_collection_modifyitems(config, items):
    """Under pytest-xdist what takes long comes first, so that the short tests fill the workers in the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not _is_long(item))
        written = GROUPS.with_suffix(f".{config.workerinput['workerid']}")
        written.write_text(json.dumps({item.nodeid: _group(item) for item in items}))
        written.replace(GROUPS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The scheduler of `--dist loadgroup`, told the groups by a file.

    Its own way, a suffix to the test's name, has no effect with pytest 9.2 (pytest-xdist issue 1386), without a word.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return groups()[nodeid]

    config.option.loadscopereorder = False
    groups = functools.cache(lambda: json.loads(GROUPS.read_text()))
    return Groups(config, log)


@pytest.fixture(autouse=True)
def _as_if_alone():
    """Isolate a test from the ones before it: no data of theirs, and the same random numbers."""
    environment, path, handler = dict(os.environ), list(sys.path), logging.lastResort
    os.environ["XDG_DATA_HOME"] = str(SESSION / "data" / uuid.uuid4().hex)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if gemm := sys.modules.get("int8kit.kernels.gemm"):
        gemm._notice.cache_clear()
    yield
    logging.lastResort = handler  # a verb silences it
    sys.path[:] = path
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:  # a verb sets some
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(scope="session")
def compilers():
    """Processes that compile, one pool for all tests of the group "compilers": each would pay the imports again."""
    from int8kit.tune import workers

    with workers.Workers() as pool:
        yield pool


@pytest.fixture
def quiet_interpreter():
    """Overflow and NaN are data to these kernels: what runs them on the CPU shall not warn of them."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def verb(capfd):
    """A verb called in this process, which has imported what it needs: verb("db", "show", status=0) -> (out, err)."""
    from int8kit.cli import main

    def call(*args, status=0):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main(list(map(str, args)))
        out, err = capfd.readouterr()
        assert ended.value.code == status, out + err
        return out, err

    return call


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A saved tiny pipeline in bf16."""
    from int8kit import models

    folder = tmp_path_factory.mktemp("float")
    models.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def floats(pipeline_folder):
    """The folder of its transformer."""
    return pipeline_folder / "transformer"


@pytest.fixture(scope="session")
def loaded(floats):
    """The transformer with INT8 layers, for tests that do not change it."""
    from diffusers import Ideogram4Transformer2DModel

    from int8kit.integrations.diffusers import Int8KitConfig

    return Ideogram4Transformer2DModel.from_pretrained(floats, quantization_config=Int8KitConfig())


@pytest.fixture(scope="session")
def saved(loaded, tmp_path_factory):
    """The folder in which it is saved."""
    folder = tmp_path_factory.mktemp("int8")
    loaded.save_pretrained(folder)
    return folder
