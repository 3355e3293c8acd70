"""What `nox -s build` put in dist/ is complete and holds nothing else."""

from __future__ import annotations

import pathlib
import tarfile
import zipfile

import pytest

DIST = pathlib.Path(__file__).parents[2] / "dist"
NAMES = ["am_tp_styles", "am_tp_plans", "am_fsdp", "am_moe", "am_pipeline"]

pytestmark = pytest.mark.skipif(not DIST.is_dir(), reason="nothing is built; run nox -s build")


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_holds_the_package_its_types_and_its_licence(name):
    (wheel,) = DIST.glob(f"{name}-*-py3-none-any.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert f"{name}/py.typed" in files
    assert f"{name}/__init__.py" in files
    assert any(f.endswith("licenses/LICENSE") for f in files)
    ours = [f for f in files if ".dist-info/" not in f]
    assert all(f.startswith(f"{name}/") and f.endswith((".py", "py.typed")) for f in ours), ours


@pytest.mark.parametrize("name", NAMES)
def test_a_source_distribution_holds_sources_tests_and_papers(name):
    (archive,) = DIST.glob(f"{name}-*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {f.split("/", 1)[1] for f in tar.getnames() if "/" in f}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO"} <= files
    assert any(f.startswith("tests/") for f in files)
    assert not any("__pycache__" in f or f.endswith(".pyc") for f in files)
