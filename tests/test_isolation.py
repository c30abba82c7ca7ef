"""conftest.py: no test uses the user's folders, and no test depends on what another test left behind."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import platformdirs
import pytest
import torch
import triton

from int8kit.database import store
from int8kit.kernels import gemm
from int8kit.spec import Kernel
from int8kit.verify.examples import regressions

SESSION = Path(os.environ["INT8KIT_TEST_SESSION"])
FOLDERS = (
    "HOME",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "TRITON_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "HF_HOME",
    "DASK_CONFIG",
)
CHILD = """
import json, os, platformdirs, triton
names = "user_data_dir", "user_cache_dir", "user_config_dir", "user_state_dir"
found = {name: getattr(platformdirs, name)("int8kit") for name in names}
print(json.dumps(found | {"triton": triton.knobs.cache.dir, "home": os.path.expanduser("~")}))
"""


@pytest.mark.process
def test_child_process_has_the_folders_of_the_session():
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    assert found["triton"] == triton.knobs.cache.dir == str(SESSION / "triton")
    assert found["home"] == str(Path.home()) == str(SESSION / "home")
    for name in found.keys() - {"triton", "home"}:
        assert found[name] == getattr(platformdirs, name)("int8kit")
        assert SESSION in Path(found[name]).parents


def test_every_folder_is_inside_the_session():
    for name in FOLDERS:
        assert SESSION in Path(os.environ[name]).parents, name
    assert SESSION in store.user_path("rtx3090").parents
    assert SESSION in regressions.path().parents


@pytest.mark.parametrize("number", [1, 2])
def test_tests_leave_nothing_behind(number):
    """The second run would find the data, the variable, the used random numbers and the given warning of the first."""
    assert not Path(platformdirs.user_data_dir("int8kit")).exists()
    Path(platformdirs.user_data_dir("int8kit")).mkdir(parents=True)
    assert "INT8KIT_LEFT_BEHIND" not in os.environ
    os.environ["INT8KIT_LEFT_BEHIND"] = "1"
    assert torch.randint(1 << 30, ()).item() == torch.randint(1 << 30, (), generator=torch.manual_seed(0)).item()
    with pytest.warns(gemm.Fallback):
        gemm._notice(Kernel.MMA_SYNC, "a reason")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gemm._notice(Kernel.MMA_SYNC, "a reason")
