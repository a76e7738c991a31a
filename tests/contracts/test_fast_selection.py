"""``pytest -m fast`` covers every package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from fast import holds_fast_tests

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
SHARED = {  # package -> folder of its tests
    "planning": "schedulers",
    "presets": "schedulers",
    "simulation": "schedulers",
    "assets": "demo",
}


def packages_without_fast_tests(root: Path, shared: Mapping[str, str] = SHARED) -> list[str]:
    """Return the folders of ``diffcache/`` whose folder of tests has no file with a fast test."""
    packages = sorted(path.parent.name for path in (root / "diffcache").glob("*/__init__.py"))
    return [
        name
        for name in packages
        if not any(map(holds_fast_tests, (root / "tests" / shared.get(name, name)).glob("test_*.py")))
    ]


def test_every_package_has_a_fast_test_file() -> None:
    assert packages_without_fast_tests(ROOT) == []


def test_a_folder_that_shares_the_tests_of_another_has_no_test_folder() -> None:
    assert [name for name in SHARED if (ROOT / "tests" / name).exists()] == []


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("import pytest\n\npytestmark = pytest.mark.fast\n", True),
        ("pytestmark = [pytest.mark.fast, pytest.mark.gpu]\n", True),
        ("@pytest.mark.fast\ndef test_one(): ...\n", True),
        ("pytestmark = pytest.mark.slow\n", False),
        ("# pytestmark = pytest.mark.fast\n", False),
        ("", False),
    ],
)
def test_a_package_without_a_fast_test_file_is_found(text: str, fast: bool, tmp_path: Path) -> None:
    for package in ("host", "simulation"):
        (tmp_path / "diffcache" / package).mkdir(parents=True)
        (tmp_path / "diffcache" / package / "__init__.py").touch()
    for folder in ("host", "schedulers"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / "test_it.py").write_text("pytestmark = pytest.mark.fast\n")
    assert packages_without_fast_tests(tmp_path) == []
    (tmp_path / "tests" / "schedulers" / "test_it.py").write_text(text)
    assert packages_without_fast_tests(tmp_path) == ([] if fast else ["simulation"])
