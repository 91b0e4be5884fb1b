"""A release is of a commit that says which version it is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_nothing_is_released_but_a_clean_commit_with_the_version_s_tag(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    clone = tmp_path / "clone"

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *words], cwd=clone, check=True, capture_output=True)

    def refused() -> str:
        command = ["bash", str(clone / "scripts" / "release.sh")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert not (clone / "dist").exists()
        return done.stderr

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    version = tomllib.loads((clone / "pyproject.toml").read_text())["project"]["version"]
    (clone / "README.md").write_text("changed\n")
    assert "there are changes that are not committed" in refused()
    git("checkout", "README.md")
    git("tag", "--force", f"v{version}")
    git("commit", "--allow-empty", "--message", "one more")
    assert f"this commit has no tag v{version}" in refused()
    for file, sentence in (
        ("CHANGELOG.md", f"CHANGELOG.md has no section '## {version}'"),
        ("CITATION.cff", f"CITATION.cff is not of version {version}"),
    ):
        before = (clone / file).read_text()
        (clone / file).write_text(before.replace(version, "9.9.9"))
        git("commit", "--all", "--message", "another version")
        git("tag", "--force", f"v{version}")
        assert sentence in refused()
        (clone / file).write_text(before)
        git("commit", "--all", "--message", "this version")
