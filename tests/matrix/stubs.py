"""Stand-ins for the NVIDIA libraries that a CUDA wheel of torch is linked to, so that it imports on a CPU.

On Linux x86_64 PyPI has torch for CUDA alone, with some 3 GB of NVIDIA libraries, none of which a save on a
CPU calls. The dynamic linker still wants each: by its SONAME, with every symbol, under its version. So each
missing library is compiled from the symbols that torch's own libraries leave undefined. Every function
answers 100, which is ``cudaErrorNoDevice``: torch then finds no GPU.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

_NVIDIA: Final = re.compile(r"^lib(cu|nv|nccl)")
# Symbols of the C++ library and of Python have no version either: one defined here would shadow the real one.
_FUNCTION: Final = re.compile(r"^_*(cu|nv|nccl)")
_STRTAB, _DYNAMIC, _DYNSYM, _VERSYM, _VERNEED = 3, 6, 11, 0x6FFFFFFF, 0x6FFFFFFE
_NEEDED: Final = 1
_WEAK, _OBJECT = 2, 1


class CompilerMissingError(Exception):
    """No C compiler is installed."""


class Symbol(NamedTuple):
    """A dynamic symbol of a library."""

    name: str
    defined: bool
    weak: bool
    is_object: bool
    library: str | None
    """SONAME that it is expected from, where it has a version."""
    version: str | None


@dataclass
class Library:
    """What the dynamic linker reads of a library."""

    needed: list[str] = field(default_factory=list)
    symbols: list[Symbol] = field(default_factory=list)


def _text(strings: bytes, offset: int) -> str:
    return strings[offset : strings.index(b"\0", offset)].decode()


class _Section(NamedTuple):
    kind: int
    data: bytes
    link: int


def _sections(path: Path) -> list[_Section]:
    """Read the sections for dynamic linking of a 64-bit little-endian ELF file."""
    wanted = {_STRTAB, _DYNAMIC, _DYNSYM, _VERSYM, _VERNEED}
    with path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no 64-bit little-endian ELF file")
        start, size, count = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        file.seek(start)
        table = file.read(size * count)
        found: list[_Section] = []
        for at in range(0, len(table), size):
            _, kind, flags, _, offset, nbytes, link = struct.unpack_from("<IIQQQQI", table, at)
            loaded = bool(flags & 2)  # .strtab for debuggers is not loaded
            data = b""
            if kind in wanted and loaded:
                file.seek(offset)
                data = file.read(nbytes)
            found.append(_Section(kind, data, link))
    return found


def _versions(sections: list[_Section]) -> dict[int, tuple[str, str]]:
    """Map each index of a needed version to the SONAME it is expected from, and its name."""
    found: dict[int, tuple[str, str]] = {}
    for section in sections:
        if section.kind != _VERNEED:
            continue
        strings, at = sections[section.link].data, 0
        while True:
            _, _, file, entries, following = struct.unpack_from("<HHIII", section.data, at)
            entry = at + entries
            while True:
                _, _, index, name, more = struct.unpack_from("<IHHII", section.data, entry)
                found[index] = _text(strings, file), _text(strings, name)
                if not more:
                    break
                entry += more
            if not following:
                break
            at += following
    return found


def read(path: Path) -> Library:
    """Read what a library needs, defines and leaves undefined."""
    sections = _sections(path)
    versions, library = _versions(sections), Library()
    indexes = next((one.data for one in sections if one.kind == _VERSYM), b"")
    for section in sections:
        strings = sections[section.link].data if section.kind in (_DYNAMIC, _DYNSYM) else b""
        if section.kind == _DYNAMIC:
            entries = struct.iter_unpack("<QQ", section.data)
            library.needed += [_text(strings, value) for tag, value in entries if tag == _NEEDED]
        elif section.kind == _DYNSYM:
            for number, (name, info, _, index, _, _) in enumerate(
                struct.iter_unpack("<IBBHQQ", section.data)
            ):
                wanted = struct.unpack_from("<H", indexes, 2 * number)[0] & 0x7FFF if indexes else 0
                source, version = versions.get(wanted, (None, None))
                library.symbols.append(
                    Symbol(
                        _text(strings, name),
                        index != 0,
                        info >> 4 == _WEAK,
                        info & 15 == _OBJECT,
                        source,
                        version,
                    )
                )
    return library


def missing(folder: Path) -> dict[str, dict[str, set[Symbol]]]:
    """Return what each NVIDIA library that is not in the folder must define, by the version of the symbols.

    A symbol without a version may be in any library: the first that its user needs has it.
    """
    present = {path.name: read(path) for path in sorted(folder.glob("*.so*")) if path.is_file()}
    defined = {one.name for library in present.values() for one in library.symbols if one.defined}
    wanted: dict[str, dict[str, set[Symbol]]] = {}
    placed: set[str] = set()
    for library in present.values():
        absent = [name for name in library.needed if _NVIDIA.match(name) and name not in present]
        for name in absent:
            wanted.setdefault(name, defaultdict(set))
        for one in library.symbols:
            if one.defined or one.weak or not one.name or one.name in defined:
                continue
            if one.library in wanted and one.version is not None:
                wanted[one.library][one.version].add(one)
            elif one.library is None and absent and one.name not in placed and _FUNCTION.match(one.name):
                placed.add(one.name)
                wanted[absent[0]][""].add(one)
    return wanted


def _source(versions: dict[str, set[Symbol]]) -> str:
    """Write C for a library's symbols; a name may have several versions, so labels are numbers."""
    lines: list[str] = []
    for number, (version, symbols) in enumerate(sorted(versions.items())):
        for index, one in enumerate(sorted(symbols)):
            label = f"stub_{number}_{index}" if version else one.name
            lines.append(f"char {label}[4096];" if one.is_object else f"long {label}(void) {{ return 100; }}")
            if version:
                lines.append(f'__asm__(".symver {label}, {one.name}@@{version}");')
    return "\n".join(lines) + "\n"


def _map(versions: dict[str, set[Symbol]]) -> str:
    named = sorted(version for version in versions if version)
    return "".join(f"{name} {{ }};\n" for name in named)


def write(folder: Path) -> list[str]:
    """Compile the NVIDIA libraries that are missing in ``torch/lib`` into it; return their names.

    Raises:
        CompilerMissingError: There are libraries to compile and no C compiler.
    """
    wanted = missing(folder)
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if wanted and compiler is None:
        raise CompilerMissingError(
            "this wheel of torch needs NVIDIA's libraries, and there is no C compiler (tried cc, gcc, clang) "
            "to make stand-ins for them. Install gcc, or give a CPU wheel: PIP_FIND_LINKS=/its/folder"
        )
    for name, versions in wanted.items():
        with tempfile.TemporaryDirectory() as scratch:
            source, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
            source.write_text(_source(versions))
            script.write_text(_map(versions))
            command = [str(compiler), "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
            if script.stat().st_size:
                command.append(f"-Wl,--version-script={script}")
            subprocess.run([*command, "-o", str(folder / name), str(source)], check=True)
    return sorted(wanted)
