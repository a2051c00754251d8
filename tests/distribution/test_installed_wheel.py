"""The installed wheel works by itself, with the sources out of reach."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True, slots=True)
class Imports:
    """Where modules were found: here, and in a spawned child."""

    folder: Path
    modules: set[str]
    here: dict[str, str]
    child: dict[str, str]
    roots: list[str]


@pytest.fixture(scope="module")
def imports(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Imports:
    """Every module of the wheel, imported from an installation of it."""
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    install += ["install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(install, check=True)
    with zipfile.ZipFile(wheel) as archive:
        modules = {
            name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name in archive.namelist()
            if name.endswith(".py")
        }
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    search = ",".join([str(folder), *sorted(libraries)])
    command = [sys.executable, "-I", "-S", str(PROBE), search, ",".join(sorted(modules))]
    probe = subprocess.run(
        command, cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True, check=False
    )
    assert probe.returncode == 0, probe.stderr
    return Imports(folder, modules, **json.loads(probe.stdout))


def test_the_front_door_storage_and_executor_are_there(imports: Imports) -> None:
    assert {"cloudckpt", "cloudckpt.backends", "cloudckpt.executor"} <= imports.modules


@pytest.mark.parametrize("process", ["here", "child"])
def test_every_module_is_imported_from_the_installation(imports: Imports, process: str) -> None:
    files: dict[str, str] = getattr(imports, process)

    assert set(files) == imports.modules
    assert {name for name, file in files.items() if not Path(file).is_relative_to(imports.folder)} == set()


def test_the_root_folders_are_not_importable_by_their_own_names(imports: Imports) -> None:
    assert imports.roots == []
