"""Where no GPU is, kernels run in Triton's interpreter; the choice is made before triton is first imported."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def quiet_interpreter():
    """Overflow and NaN are data to these kernels: what runs them on the CPU shall not warn of them."""
    with np.errstate(all="ignore"):
        yield
