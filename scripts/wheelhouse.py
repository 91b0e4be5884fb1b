"""A folder from which fedsp is installed without a network: its wheel, the wheels of everything it
needs for this machine's Python and platform, and `requirements.txt` with the digest of each.

    python scripts/wheelhouse.py dist/wheelhouse [EXTRA,...]
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parent.parent


def main(folder: Path, extras: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    subprocess.run(
        [*pip, "-c", "constraints.txt", "-w", str(folder.resolve()), f".[{extras}]"],
        cwd=ROOT,
        check=True,
    )
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(wheel.name)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    (folder / "requirements.txt").write_text("".join(lines), "utf-8")
    print(f"{folder}: {len(lines)} wheels, each with its digest in requirements.txt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "flower")
