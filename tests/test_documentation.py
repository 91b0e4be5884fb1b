"""The documentation builds, its links lead somewhere, and what it shows is what the code has."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.recipe
def test_the_pages_build_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-4000:]
    keys = (tmp_path / "reference" / "configuration.html").read_text()
    assert "auxiliary_steps" in keys and "max_epsilon" in keys
    for key in ("text", "plans"):  # a list, and one of texts or lists
        (row,) = re.findall(rf"<td><code>{key}</code></td>\s*<td>(.*?)</td>", keys)
        assert row.startswith("list of str"), row
    assert "Annotated" not in keys
    assert "federate" in (tmp_path / "reference" / "python.html").read_text()
    assert "fedsp federation init" in (tmp_path / "reference" / "commands.html").read_text()
    assert "round loop" in (tmp_path / "reference" / "files.html").read_text()


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "Makefile"]
)
def test_files_that_the_front_door_names_are_there(name: str) -> None:
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    links += re.findall(r"\bdocs/[\w./-]+\.(?:md|html)", text)
    assert not [link for link in links if not (ROOT / link).exists()]


def test_what_the_documentation_imports_is_there() -> None:
    """Every import of fedsp in a command or an example of a page."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {
        (module, name.strip())
        for page in pages
        for module, names in re.findall(
            r"\bfrom (fedsp[\w.]*) import (\w+(?:, \w+)*)", page.read_text()
        )
        for name in names.split(",")
    }
    assert found and not [
        f"from {module} import {name}"
        for module, name in sorted(found)
        if not hasattr(import_module(module), name)
    ]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_one_version() -> None:
    found = version("fedsp")
    assert f"## {found}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {found}" in (ROOT / "CITATION.cff").read_text()
