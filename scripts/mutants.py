"""The score of `mutmut run`: how many deliberate bugs in the modules that promises rest on are seen
by a test or by the type checker.

Those that change nothing anybody could rely on stand in `tests/accepted_mutants.toml`, each with
its reason; they do not count. Ends with 1 where less than LEAST of the others is seen, or where
something is accepted that mutmut no longer makes.

    python scripts/mutants.py
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

LEAST = 0.95
ACCEPTED = Path(__file__).resolve().parents[1] / "tests" / "accepted_mutants.toml"
SEEN = {"killed", "caught by type check", "timeout", "segfault"}


def mutmut(*arguments: str) -> str:
    return subprocess.run(
        [str(Path(sys.executable).parent / "mutmut"), *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def statuses() -> dict[str, str]:
    """What became of each mutant, by its name."""
    lines = (
        line.strip().rsplit(": ", 1)
        for line in mutmut("results", "--all", "true").splitlines()
        if ": " in line
    )
    return {name: status for name, status in lines if "__mutmut_" in name}


def change(name: str) -> tuple[str, str]:
    """The lines that a mutant takes away, and those that it puts in their place."""
    diff = [
        line
        for line in mutmut("show", name).splitlines()
        if line[:1] in "+-" and not line.startswith(("+++", "---"))
    ]
    return tuple("\n".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+")  # type: ignore[return-value]


def module(name: str) -> str:
    """The module that a mutant is of."""
    return name.rpartition(".")[0]


def main() -> None:
    """Print the score of each module and what is not seen."""
    accepted = {
        (entry["module"], entry["removed"], entry["added"])
        for entry in tomllib.loads(ACCEPTED.read_text(encoding="utf-8")).get("accepted", [])
    }
    found = statuses()
    unseen = {name: change(name) for name, status in found.items() if status not in SEEN}
    excused = {
        name
        for name, (removed, added) in unseen.items()
        if (module(name), removed, added) in accepted
    }
    stale = accepted - {(module(name), *unseen[name]) for name in excused}
    made, seen = (
        Counter(map(module, found)),
        Counter(module(name) for name in found if name not in unseen),
    )
    free = Counter(map(module, excused))
    for name in sorted(made):
        print(
            f"{name}: {seen[name]} of {made[name] - free[name]} are seen, {free[name]} are accepted"
        )
    for name, (removed, added) in sorted(unseen.items()):
        if name not in excused:
            print(f"\n{name} ({found[name]})\n- {removed}\n+ {added}")
    for entry in sorted(stale):
        print(f"\nno longer made, or seen: {entry}")
    share = seen.total() / max(1, made.total() - free.total())
    print(
        f"\n{seen.total()} of {made.total() - free.total()}, {share:.1%}; {free.total()} accepted"
    )
    sys.exit(bool(stale) or share < LEAST)


if __name__ == "__main__":
    main()
