"""Run a fast subset of the tests on the oldest and the newest versions that are supported: `make matrix`.

The oldest pair is the oldest Python with every requirement of pyproject.toml at its floor. The newest is the
newest Python that is installed with the newest release of everything. What this machine does not have is
said in one line, and left out. `--python` and `--torch` try another pair.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from matrix import interpreters, subset
from matrix.environment import BrokenError, Deadline, Environment, Pair, UnavailableError
from matrix.interpreters import Interpreter


def _say(line: str) -> None:
    print(f"==> matrix: {line}", flush=True)  # noqa: T201 - a command


def _usable(pair: Pair, deadline: Deadline) -> Environment | None:
    """Set up the pair on the first interpreter that it can be had for; say what was missing."""
    newest = pair.name == "newest"
    skipped: set[interpreters.Version] = set()
    while True:
        found, missing = interpreters.choose(newest=newest, without=skipped)
        for line in missing:
            _say(f"{pair.name}: {line}")
        if found is None:
            _say(f"{pair.name}: left out, no interpreter is left to try")
            return None
        environment = Environment(pair, found, deadline)
        try:
            environment.set_up()
        except UnavailableError as error:
            _say(f"{pair.name}: {error}")
            skipped |= {found.version}
        else:
            return environment


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="matrix", description=__doc__)
    parser.add_argument("--only", choices=["oldest", "newest"], help="one of the two pairs")
    parser.add_argument("--python", metavar="X.Y", help="a pair of your own")
    parser.add_argument("--torch", metavar="X.Y.Z", help="this torch, with the newest of the rest")
    parser.add_argument("--set-up", action="store_true", help="make the environments, and run nothing")
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="for everything; 480")
    return parser.parse_args(arguments)


def _environments(options: argparse.Namespace, deadline: Deadline) -> list[Environment]:
    if options.python or options.torch:
        version = interpreters.Version(*map(int, (options.python or "3.11").split(".")))
        found: Interpreter | None = interpreters.find(version)
        if found is None:
            raise UnavailableError(interpreters.how_to_get(version))
        pair = Pair.of(str(version), options.torch)
        environment = Environment(pair, found, deadline)
        environment.set_up()
        return [environment]
    pairs = [pair for pair in (Pair.oldest(), Pair.newest()) if options.only in (None, pair.name)]
    return [one for pair in pairs if (one := _usable(pair, deadline)) is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up the pairs and run the tests on each; return 1 if that failed."""
    options = _parsed(arguments)
    deadline = Deadline(options.limit)
    failed = False
    try:
        environments = _environments(options, deadline)
    except (BrokenError, UnavailableError) as error:
        _say(str(error))
        return 1
    if not environments:
        _say("no pair could be set up: NOTHING WAS TRIED on other versions of Python and torch")
    for environment in environments:
        _say(f"{environment.pair.name}: Python {environment.versions()}")
        if options.set_up:
            continue
        try:
            subset.run(environment)
        except BrokenError as error:
            failed = True
            _say(f"{environment.pair.name}: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
