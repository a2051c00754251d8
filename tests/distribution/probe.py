"""Import the modules named on the command line, here and in a spawned child, and print where each was found.

Run as `python -I -S probe.py FOLDERS MODULES`, both comma-separated: `-I` and `-S` leave the import path bare
(no working folder, no environment, no `.pth` file and so no editable install); only FOLDERS are added to it.
"""

import importlib
import importlib.util
import json
import multiprocessing
import sys


def found(modules: list[str]) -> dict[str, str | None]:
    """Import each module; the file it came from."""
    return {name: importlib.import_module(name).__file__ for name in modules}


def main() -> None:
    folders, modules = (argument.split(",") for argument in sys.argv[1:])
    sys.path[:0] = folders
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        in_child = pool.apply(found, (modules,))
    roots = [name for name in ("backends", "executor") if importlib.util.find_spec(name) is not None]
    print(json.dumps({"here": found(modules), "child": in_child, "roots": roots}))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
