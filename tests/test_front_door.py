"""``import cloudckpt`` gives every public name, and imports torch only once it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cloudckpt


def succeeds(code: str) -> None:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", cloudckpt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(cloudckpt, name)
    assert name in dir(cloudckpt)
    assert getattr(value, "__name__", name) == name


def test_a_name_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(AttributeError, match="module 'cloudckpt' has no attribute 'StorageWritr'"):
        _ = cloudckpt.StorageWritr  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]


def test_importing_and_catching_errors_takes_no_torch() -> None:
    succeeds("import sys, cloudckpt\ncloudckpt.CheckpointError\nassert 'torch' not in sys.modules")


def test_the_packages_are_reached_by_the_import_of_the_library_alone() -> None:
    succeeds("import cloudckpt\ncloudckpt.executor.ProcessExecutor\ncloudckpt.backends.version.__version__")
    succeeds("from cloudckpt import *\nCheckpointer, verify, __version__")
