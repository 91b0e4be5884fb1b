"""Benchmarks that need a machine of their own run here in a small shape, so that they still start
when there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, minutes: str) -> dict[str, object]:
    """What `benchmarks/gpu.py` writes of a tiny model on the CPU."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    small = ["--batch", "2", "--steps", "1", "--repeats", "1", "--documents", "8", "--texts", "8"]
    where = ["--device", "cpu", "--dtype", "float32", "--models", "tiny", "--minutes", minutes]
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(folder), *where, *small])
    import gpu  # type: ignore[import-not-found,unused-ignore]

    gpu.main()
    found: dict[str, object] = json.loads((folder / "gpu.json").read_text())
    return found


@pytest.mark.recipe
def test_the_gpu_benchmark_measures_every_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_gpu(monkeypatch, tmp_path, "9")
    rows = found["rows"]
    assert isinstance(rows, list) and found["left out"] == []
    assert {row["stage"] for row in rows} == {
        "prompt",
        "adapter",
        "auxiliary",
        "evaluation",
        "distillation",
    }
    assert all(row["rate"] > 0 for row in rows)
    differences = [row["largest difference"] for row in rows if "largest difference" in row]
    assert differences and max(differences) < 1e-4
    table = (tmp_path / "gpu.md").read_text().splitlines()
    assert sum(line.startswith("| tiny |") for line in table) == len(rows)


def test_the_gpu_benchmark_names_what_its_minutes_leave_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_gpu(monkeypatch, tmp_path, "0")
    assert found["rows"] == []
    assert "tiny, adapter, fedsp" in str(found["left out"])
    assert "tiny, adapter, fedsp" in (tmp_path / "gpu.md").read_text()
