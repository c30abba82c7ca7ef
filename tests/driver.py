"""GPUs as the driver describes them to torch, for tests without a GPU."""

from types import SimpleNamespace

import torch


def properties(name, major, minor, sms, gib, shared_memory=101376, **more):
    """What `torch.cuda.get_device_properties` returns for a GPU."""
    return SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=sms, total_memory=int(gib * 2**30),
        shared_memory_per_block_optin=shared_memory, L2_cache_size=6 << 20, max_threads_per_multi_processor=1536,
        **more,
    )  # fmt: skip


def pretend(monkeypatch, given, hip=None):
    """Make torch report one CUDA device with these properties."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: given)
    monkeypatch.setattr(torch.version, "hip", hip)
