"""Everything in this folder needs a CUDA device and is skipped without one."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    missing = not torch.cuda.is_available()
    for item in items:
        if "gpu" in item.path.parts and missing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif "gpu" in item.path.parts:  # shapes of tests are not tuned
            item.add_marker(pytest.mark.filterwarnings("ignore::int8kit.NotTuned"))
