"""Differential privacy: randomness, clipping, noise, what has been spent, and what is promised.
Tensors by name; nothing here knows of language models.

Two units. *Example level* (Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133): each client
clips the gradient of each of its examples and adds noise before anything leaves it. *Client level*
(McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963): the server, which is trusted, clips
the whole update of each client and adds noise to their sum. In both, neighbours differ by one unit
added or removed, and the accountant is Google's dp-accounting with privacy loss distributions.

Nothing private is ever drawn from the seed of a run, which others know: neither noise nor who is
sampled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from random import SystemRandom
from typing import Any

import torch
from torch import Tensor

from fedsp.errors import PrivacyError, StorageError, require_installed
from fedsp.storage import parse_json, sync_folder, write_json

LEDGER = "privacy.jsonl"
LEAST_NOISE = 0.05
"""Smallest usable noise multiplier. Below it one release costs an epsilon of over 100, which is
reported as infinite."""
_system = SystemRandom()


def gaussian(shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float64, from the operating system's random source.

    Each is half the sum of four Box-Muller draws, so that the gaps of floating-point numbers tell
    less of what was added to it (Holohan and Braghin 2021, https://arxiv.org/abs/2107.10138).
    """
    count = math.prod(shape)
    return torch.stack([_box_muller(count) for _ in range(4)]).sum(dim=0).div_(2).view(tuple(shape))


def _box_muller(count: int) -> Tensor:
    pairs = max(1, (count + 1) // 2)  # torch reads no empty buffer
    bits = torch.frombuffer(bytearray(os.urandom(16 * pairs)), dtype=torch.int64)
    uniform = ((bits & ((1 << 53) - 1)).double() + 1) * 2.0**-53  # in (0, 1]
    radius, angle = (-2 * uniform[:pairs].log()).sqrt(), 2 * math.pi * uniform[pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def poisson_sample(count: int, rate: float) -> list[int]:
    """Each of `count` indices with probability `rate`, independently, from the operating system's
    random source."""
    return [index for index in range(count) if _system.random() < rate]


def clipped_sum(rows: Tensor, bound: float) -> Tensor:
    """The sum (N,), float64, of rows (B, N) that are each scaled down to Euclidean length `bound`
    at most; a row that is not finite counts as zero.

    So one row more or less changes the sum by `bound` at most.
    """
    rows = rows.double()
    lengths = rows.norm(dim=1, keepdim=True)
    usable = torch.isfinite(lengths)
    return torch.where(usable, rows * (bound / lengths.clamp_min(1e-300)).clamp(max=1.0), 0.0).sum(
        dim=0
    )


def noised_mean(total: Tensor, *, bound: float, noise_multiplier: float, expected: float) -> Tensor:
    """A sum of clipped rows with noise of standard deviation `noise_multiplier` x `bound`, divided
    by how many rows were expected, never by how many there were; float64."""
    return (total.double() + noise_multiplier * bound * gaussian(total.shape)) / expected


@dataclass(frozen=True)
class Release:
    """`count` runs of the Gaussian mechanism, each on a Poisson sample of rate `sampling_rate` (1:
    all units), with noise of `noise_multiplier` times the clipping bound."""

    noise_multiplier: float
    sampling_rate: float = 1.0
    count: int = 1


@lru_cache(maxsize=1024)
def epsilon(releases: tuple[Release, ...], delta: float, interval: float = 1e-4) -> float:
    """The epsilon at `delta` of these releases together, when neighbours differ by one unit added
    or removed; infinite where there is no noise.

    It is an upper bound: privacy losses are rounded up to multiples of `interval`.
    """
    require_installed("privacy", "differential privacy needs", "dp_accounting", error=PrivacyError)
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    if any(release.noise_multiplier < LEAST_NOISE and release.count for release in releases):
        return math.inf
    accountant = PLDAccountant(value_discretization_interval=interval)
    for release in merged(releases):
        event = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        sampled = (
            event
            if release.sampling_rate == 1
            else dp_accounting.PoissonSampledDpEvent(release.sampling_rate, event)
        )
        accountant.compose(sampled, release.count)
    return float(accountant.get_epsilon(delta))


def merged(releases: Iterable[Release]) -> tuple[Release, ...]:
    """The same releases, those of one kind as one, in a fixed order."""
    counts: dict[tuple[float, float], int] = {}
    for release in releases:
        kind = (release.noise_multiplier, release.sampling_rate)
        counts[kind] = counts.get(kind, 0) + release.count
    return tuple(Release(*kind, count) for kind, count in sorted(counts.items()) if count)


@lru_cache(maxsize=256)
def noise_for(target: float, delta: float, sampling_rate: float, count: int) -> float:
    """The noise multiplier, rounded up to four places, at which `count` releases cost `target`
    epsilon at `delta` at most.

    Raises:
        PrivacyError: no usable noise is that much.
    """

    def cost(noise: float) -> float:
        return epsilon((Release(noise, sampling_rate, count),), delta, 1e-3)

    low, high = 0.0, 1.0
    while cost(high) > target:
        low, high = high, 2 * high
        if high > 1e5:
            raise PrivacyError(
                f"epsilon = {target:g} at delta = {delta:g} over {count} releases needs more noise"
                " than 100000 times the bound: ask for a larger epsilon"
            )
    while high - low > 1e-3 * high and high > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return math.ceil(high * 1e4) / 1e4


class Ledger:
    """The privacy ledger: an append-only file of releases, one per line, synced to disk before the
    release is sent.

    A line cut short by a crash was never followed by a release, and is dropped. Each line has a
    digest of itself and all lines before it, and a second file holds the newest digest, so that
    truncating, editing or deleting either file is detected. Restoring old copies of both is
    detected by comparison with the replies or rounds made since (`PrivateAnswers`, `round_config`).

    Raises:
        StorageError: a file cannot be read, a line is not a valid release, or the digests do not
            match.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head = path.with_name(f"{path.name}.head")
        self._entries: list[dict[str, Any]] = []
        chains = [""]
        head: Any = {"lines": 0, "chain": ""}
        try:
            whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
            if self._head.exists():
                head = parse_json(self._head.read_bytes())
            for number, line in enumerate(whole.splitlines(), start=1):
                entry = _entry(line, chains[-1])
                if entry is None:
                    raise StorageError(
                        f"line {number} of the privacy ledger {path} is damaged: what was spent is"
                        " not known; restore the file from a backup"
                    )
                self._entries.append(entry)
                chains.append(str(entry["chain"]))
            self._chain, lines = chains[-1], head["lines"]
            # a crash came between a line and its head
            self._behind = lines == len(self._entries) - 1
            kept = (
                isinstance(lines, int)
                and max(0, len(self._entries) - 1) <= lines < len(chains)
                and chains[lines] == head["chain"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"the privacy ledger {path} or {self._head.name} beside it cannot be read: what was"
                " spent is not known; restore both from a backup"
            ) from error
        if not kept:
            raise StorageError(
                f"the privacy ledger {path} does not match {self._head.name} beside it, which"
                f" records {lines} lines: one of the two was changed; restore both from a backup"
            )

    def paid(self, run: str, round: int) -> bool:
        """Whether anything was released in a round of a run."""
        return any(
            (entry.get("run"), entry.get("round")) == (run, round) for entry in self._entries
        )

    def releases(self, run: str | None = None) -> tuple[Release, ...]:
        """Everything released so far, or all that one run has."""
        return merged(
            _release(entry) for entry in self._entries if run is None or entry.get("run") == run
        )

    def epsilon(self, delta: float, *more: Release, run: str | None = None) -> float:
        """The epsilon of everything so far (or of one run), and of `more`."""
        return epsilon(merged([*self.releases(run), *more]), delta, 1e-3)

    def spend(self, release: Release, **about: object) -> None:
        """Write down a release that is about to be made; returns when it is on the disk.

        Raises:
            StorageError: the disk did not take it, so nothing may be released.
        """
        entry: dict[str, Any] = {**asdict(release), **about}
        _release(entry)
        entry["chain"] = _chained(entry, self._chain)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._behind:
                self._write_head()
            new = not self.path.exists()
            with open(self.path, "ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path.parent)
            self._entries.append(entry)
            self._chain = entry["chain"]
            self._write_head()
        except OSError as error:
            raise StorageError(
                f"cannot write the privacy ledger {self.path}: {error.strerror or error}; nothing"
                " was released; free some space, then resume"
            ) from error

    def _write_head(self) -> None:
        write_json(self._head, {"lines": len(self._entries), "chain": self._chain})
        self._behind = False


def _release(entry: Mapping[str, Any]) -> Release:
    """The release of an entry.

    Raises:
        ValueError: its numbers are none that a release can have.
    """
    release = Release(
        float(entry["noise_multiplier"]), float(entry["sampling_rate"]), int(entry["count"])
    )
    if not (
        0 < release.noise_multiplier < math.inf
        and 0 < release.sampling_rate <= 1
        and release.count >= 1
    ):
        raise ValueError(
            f"{release} is not a valid release: it needs noise, a sampling rate up to 1, and a"
            " count of at least 1"
        )
    return release


def _entry(line: bytes, chain: str) -> dict[str, Any] | None:
    """The entry in a line of a ledger behind the chain so far; None where it is damaged."""
    try:
        entry: dict[str, Any] = parse_json(line)
        _release(entry)
        return entry if entry["chain"] == _chained(entry, chain) else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _chained(entry: Mapping[str, Any], chain: str) -> str:
    content = json.dumps(
        {key: value for key, value in entry.items() if key != "chain"}, sort_keys=True
    )
    return hashlib.sha256(f"{chain}\n{content}".encode()).hexdigest()
