"""Files that are either whole or not there: every write goes to a temporary file, is flushed, and
is renamed into place. Torch is loaded with the first tensor, since commands that have none use this
too."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from fedsp.errors import StorageError

MANIFEST = "auxiliary.json"
"""The file that says what the auxiliary model beside it is."""

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIGEST = "sha256"


def room_for_large_files() -> str:
    """A folder for large files that go with the process: TMPDIR if it is set; else /var/tmp, which
    unlike /tmp is a disk everywhere (file-hierarchy(7))."""
    choices = (os.environ.get("TMPDIR", ""), "/var/tmp", tempfile.gettempdir())
    return next(folder for folder in choices if os.access(folder, os.W_OK))


def cache_folder() -> Path:
    """Where what can be made again is kept: `fedsp` in the user's cache folder (XDG Base Directory
    Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsp"


def tensor_on_disk(count: int, dtype: torch.dtype, *, what: str, instead: str) -> Tensor:
    """A tensor (count,) mapped to a temporary file that is already unlinked, and ends with the
    process. `what` it holds, and what to do `instead` of freeing space, are for the message.

    Raises:
        StorageError: the disk is full.
    """
    import torch

    size, folder = count * dtype.itemsize, room_for_large_files()
    with tempfile.NamedTemporaryFile(prefix="fedsp-states-", dir=folder) as file:
        try:
            if sys.platform == "linux":
                # reserve it: a full disk would later kill the process with SIGBUS
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise StorageError(
                f"{what} need {size / 2**30:.1f} GiB in {folder} ({error.strerror}): set TMPDIR to"
                f" a folder with more room, or {instead}"
            ) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; after a crash the old content or the new stands there,
    never a part.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; what was there before is untouched:"
            " free some space or choose another folder, then start again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a new file's content alone may outlive a power cut
    that its name does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished_beside(target: Path) -> Path:
    """A free path for building a folder before `move_into_place`: beside `target`, or inside it if
    it exists already (it may be a mount). Remains of an earlier attempt are removed."""
    place = target / ".part" if target.is_dir() else target.with_name(f".{target.name}.part")
    shutil.rmtree(place, ignore_errors=True)
    return place


def move_into_place(folder: Path, target: Path, *, last: str) -> None:
    """Move a finished folder to `target`: in one rename, or, if `target` exists already, file by
    file, with the file named `last`, which marks it as complete, at the end.

    Raises:
        StorageError: a file could not be moved.
    """
    try:
        if folder.parent == target:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
                path.rename(target / path.name)
            folder.rmdir()
        else:
            folder.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; choose another folder"
        ) from error


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that ends with the process; False where another holds it and `wait` is off.

    Raises:
        StorageError: the lock's file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path).acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; choose another folder"
        ) from error
    else:
        with lock:
            yield True


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that somebody else wrote.

    Raises:
        ValueError: it is not JSON, is nested too deeply, names a field twice, or holds a number or
            a character that nothing can use; the message quotes none of it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a field has the same name as another")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
        if "\\u" in (text if isinstance(text, str) else text.decode(errors="replace")):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("an unpaired UTF-16 surrogate is not a character") from None
    except ValueError as error:
        raise ValueError(
            "a number has too many digits" if "digits" in str(error) else str(error)
        ) from None
    return value


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def each_figure(
    figures: Mapping[str, Any], within: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each figure of nested ones, however deep, behind the names that lead to it."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from each_figure(value, (*within, name))
        else:
            yield (*within, name), value


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    from torch import uint8

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(
            tensor.flatten().view(dtype=uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write tensors as safetensors with their digest in the header; returns the digest."""
    from safetensors.torch import save

    digest = tensors_digest(tensors)
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    write_bytes(path, save(plain, metadata={**(metadata or {}), DIGEST: digest}))
    return digest


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and the metadata beside them, and hold them against the digest in the header if
    there is one.

    Raises:
        StorageError: the file is missing, cut short, or its content is not what its digest says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = (
            "there is no such file"
            if not path.exists()
            else f"it is cut short or is not a safetensors file ({error})"
        )
        raise StorageError(f"cannot read {path}: {reason}") from error
    if DIGEST in metadata and tensors_digest(tensors) != metadata[DIGEST]:
        raise StorageError(
            f"cannot use {path}: its content does not have the SHA-256 digest that its header"
            " states"
        )
    return tensors, metadata
