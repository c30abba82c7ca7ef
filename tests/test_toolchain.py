"""Supported versions of Triton, and the callers that refuse another one."""

from importlib import metadata

import pytest

from int8kit import toolchain
from int8kit.bench import contestants
from int8kit.database import store
from int8kit.errors import InputError
from int8kit.gpus import get
from int8kit.runtime import generate
from int8kit.toolchain import unsupported
from int8kit.tune import session
from int8kit.verify import executors


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.2", "3.7.1+git1", "3.9.0rc1"])
def test_supported_versions_of_triton(version):
    assert unsupported(version) is None


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.10.0", "3.10.0.dev1", "4.0.0"])
def test_other_versions_are_refused_with_the_remedy(version):
    reason = unsupported(version)
    assert reason == (f"Triton {version} is not supported: expected 3.6 to 3.9; run pip install 'triton>=3.6,<3.10'")


def test_a_text_that_is_no_version_is_refused():
    with pytest.raises(InputError, match=r"'three': expected a version such as 3\.7\.1"):
        unsupported("three")


@pytest.mark.parametrize(
    "start",
    [
        lambda: generate.generate(generate.ImageRequest(("a bicycle",))),
        lambda: session.targets_of([get("rtx3090")], []),
        lambda: executors.available(get("rtx3090")),
        lambda: contestants.ours(get("h200")),
        lambda: store.load_plans("h200"),
    ],
    ids=["run", "tune", "verify", "bench", "python"],
)
def test_an_unsupported_triton_is_refused_before_the_work(monkeypatch, start):
    monkeypatch.setattr(metadata, "version", lambda name: {"triton": "4.0.0"}[name])
    with pytest.raises(InputError, match=r"^Triton 4\.0\.0 is not supported: expected 3\.6 to 3\.9; run pip install"):
        start()


def test_without_triton_nothing_is_refused(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert toolchain.require_supported() is None
