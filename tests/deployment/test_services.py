"""What an engineer who runs services finds in `deploy/`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from fedsp.experiments.run_directory import RunDirectory
from fedsp.storage import read_tensors
from support.deployed import until
from support.small_federation import make_federation

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
IMAGES = sorted((DEPLOY / "containers").glob("Containerfile.*"))


@pytest.fixture()
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit with a command that this machine has."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    source: Path = request.param
    text = source.read_text()
    command = Path(sys.executable).with_name("fedsp")
    path = tmp_path / source.name
    path.write_text(text.replace("/opt/fedsp/bin/fedsp", str(command)))
    return path


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name, indirect=True)
def test_a_unit_is_right_and_hardened(unit: Path) -> None:
    def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["systemd-analyze", *arguments, str(unit)], capture_output=True, text=True, check=False
        )

    right = analyze("verify")
    assert right.returncode == 0 and not right.stderr, right.stderr
    # 0 is nothing exposed, 100 everything; what is called OK is below 40
    hardened = analyze("security", "--offline=true", "--threshold=20")
    assert hardened.returncode == 0, hardened.stdout


def test_there_is_one_of_each_side() -> None:
    assert [path.stem for path in UNITS] == ["fedsp-client", "fedsp-server"]
    assert [path.suffix for path in IMAGES] == [".client", ".server"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.suffix)
def test_an_image_is_pinned_by_digest_runs_as_nobody_and_fetches_nothing(image: Path) -> None:
    lines = [line for line in image.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    assert re.search(r"^ARG PYTHON_IMAGE$", text, re.M), "no default: whoever builds names a digest"
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${PYTHON_IMAGE}"}
    assert lines.index("USER 10001") > max(
        number for number, line in enumerate(lines) if line.startswith("RUN")
    )
    assert not re.search(r"\b(curl|wget|apt|apt-get|git|pip)\b", text)
    for source in re.findall(r"^COPY (deploy/\S+)", text, re.M):
        assert (DEPLOY.parent / source).is_file(), source


def test_what_installs_is_a_script_that_says_what_it_lacks(tmp_path: Path) -> None:
    script = DEPLOY / "containers" / "install.sh"
    told = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False)
    assert told.returncode and "usage: install.sh WHEELHOUSE PREFIX" in told.stderr
    assert "--require-hashes" in script.read_text() and "--no-index" in script.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="whoever is not root is told that first")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "usage: clean_root.sh ROOT WHEELHOUSE"),
        (["root"], "usage: clean_root.sh ROOT WHEELHOUSE"),
        (["root", "."], "holds no requirements.txt: `make wheelhouse` makes one"),
        ([".", "wheelhouse"], ". is in use: give a new folder"),
    ],
)
def test_what_makes_a_clean_root_says_what_it_lacks(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "wheelhouse").mkdir()
    (tmp_path / "wheelhouse" / "requirements.txt").touch()
    (tmp_path / "debootstrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "debootstrap").chmod(0o755)
    script = DEPLOY.parent / "scripts" / "clean_root.sh"
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(script), *words]
    told = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
    )
    assert told.returncode and sentence in told.stderr, told.stderr
    assert not (tmp_path / "root").exists()


IN_A_CLEAN_ROOT = """
set -e
mount -t tmpfs tmpfs "$1/tmp" && mkdir "$1/tmp/wheelhouse"
mount --bind "$2" "$1/tmp/wheelhouse" && cp "$3" "$1/tmp/install.sh"
chroot "$1" sh /tmp/install.sh /tmp/wheelhouse /tmp/fedsp
chroot --userspec=10001:10001 "$1" env -i HOME=/tmp PATH=/tmp/fedsp/bin:/usr/bin:/bin \\
    sh -c 'cd /tmp && fedsp party init hospital && fedsp init run.toml'
"""


def test_what_the_images_run_installs_in_a_clean_root_without_a_network() -> None:
    """In a root that `make services` makes; what is installed there is gone behind the test."""
    root, wheelhouse = (os.environ.get(f"FEDSP_{name}") for name in ("CLEAN_ROOT", "WHEELHOUSE"))
    if not root or not wheelhouse or os.geteuid():
        pytest.skip("name FEDSP_CLEAN_ROOT, a root, and FEDSP_WHEELHOUSE, as the root user")
    shell = ["unshare", "--mount", "--net", "sh", "-c", IN_A_CLEAN_ROOT, "sh", root, wheelhouse]
    done = subprocess.run(
        [*shell, str(DEPLOY / "containers" / "install.sh")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fedsp \d", done.stdout, re.M) and "its fingerprint, SHA256:" in done.stdout


def test_the_services_of_a_federation_reach_each_other_and_nobody_else() -> None:
    yaml = pytest.importorskip("yaml")
    told = yaml.safe_load((DEPLOY / "containers" / "compose.yaml").read_text())
    assert told["networks"] == {"federation": {"internal": True}}
    for service in told["services"].values():
        assert service["networks"] == ["federation"] and service["read_only"]
        assert service["cap_drop"] == ["ALL"] and "ports" not in service
        assert service["image"].startswith("${FEDSP_")


def federation_of_two(folder: Path, host: str, owner: int) -> tuple[RunDirectory, Path]:
    """A run in one place, and a federation of the same whose parties' folders have all they need,
    wherever they are, and belong to a user."""
    local, place = make_federation(folder, host=host, listen="0.0.0.0", partition={"clients": 2})
    server = place / "server"
    shutil.copytree(
        folder / "files", server, dirs_exist_ok=True, ignore=shutil.ignore_patterns("train.jsonl")
    )
    text = (server / "run.toml").read_text()
    text = text.replace(str(server / "run"), "run").replace(f"{folder / 'files'}/", "")
    (server / "run.toml").write_text(text)
    for path in [place, *place.rglob("*")]:
        os.chown(path, owner, owner)
    return local, place


def require_same(run: RunDirectory, local: RunDirectory) -> None:
    """It ended as the run in one place did: to the last bits, which the number of threads moves."""
    assert run.finished and run.result()["failures"] == 0
    assert len(run.records()) == len(local.records()) == 3
    found, expected = (read_tensors(one.best)[0] for one in (run, local))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.deployment
def test_the_compose_file_runs_a_federation_to_its_end(tmp_path: Path) -> None:
    """With images that `make wheelhouse` and the container files make, and an engine."""
    images = [os.environ.get(f"FEDSP_{side}_IMAGE") for side in ("SERVER", "CLIENT")]
    compose = shlex.split(os.environ.get("FEDSP_COMPOSE", ""))
    if not all(images) or not compose or os.geteuid():
        pytest.skip(
            "name FEDSP_SERVER_IMAGE, FEDSP_CLIENT_IMAGE and FEDSP_COMPOSE, such as 'docker"
            " compose', as the root user"
        )
    local, place = federation_of_two(tmp_path, "server", 10001)
    file = tmp_path / "deploy" / "containers" / "compose.yaml"
    file.parent.mkdir(parents=True)
    text = (DEPLOY / "containers" / file.name).read_text()
    file.write_text(text.replace("hospital-a", "client-0").replace("hospital-b", "client-1"))
    project = ["-f", str(file), "-p", f"fedsp-{os.getpid()}"]
    try:
        done = subprocess.run(
            [*compose, *project, "up"],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.stdout.count("the run is finished") == 2, done.stdout + done.stderr
    finally:
        subprocess.run([*compose, *project, "down"], capture_output=True, check=False)
    require_same(RunDirectory.open(place / "server" / "run"), local)


@pytest.mark.deployment
def test_the_units_run_a_federation_to_its_end(tmp_path: Path) -> None:
    """In a root with systemd, a user `fedsp` and fedsp in /opt/fedsp, booted as a container; what
    is written there is gone behind the test."""
    root = os.environ.get("FEDSP_SYSTEMD_ROOT")
    if not root or os.geteuid() or not shutil.which("systemd-nspawn"):
        pytest.skip("name FEDSP_SYSTEMD_ROOT, a root with systemd and fedsp, as the root user")
    user = re.search(r"^fedsp:[^:]*:(\d+):", (Path(root) / "etc" / "passwd").read_text(), re.M)
    assert user, "there is no user fedsp in it"
    local, place = federation_of_two(tmp_path, "localhost", int(user[1]))
    bound = ["--bind-ro=/etc/hosts"]
    units = {}
    for party, name in (("server", "server"), ("client-0", "client"), ("client-1", "client")):
        unit, folder = f"fedsp-{party}.service", f"/var/lib/fedsp/{party}"
        text = (DEPLOY / "systemd" / f"fedsp-{name}.service").read_text()
        units[party] = tmp_path / unit
        units[party].write_text(text.replace(f"/var/lib/fedsp/{name}\n", f"{folder}\n"))
        bound += [
            f"--bind-ro={units[party]}:/etc/systemd/system/{unit}",
            f"--bind={place / party}:{folder}",
        ]
    how = ["--quiet", "--register=no", "--keep-unit", "--volatile=overlay", "-D", root]
    wanted = [f"systemd.wants={unit.name}" for unit in units.values()]
    with open(tmp_path / "boot.log", "wb") as log:
        booted = subprocess.Popen(
            ["systemd-nspawn", *how, *bound, "--boot", *wanted],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            until(lambda: (place / "server" / "run" / "result.json").exists(), 300.0)
        finally:
            # its first process, with which all of it ends
            for process in psutil.Process(booted.pid).children():
                process.kill()
            booted.wait(60)
    require_same(RunDirectory.open(place / "server" / "run"), local)
