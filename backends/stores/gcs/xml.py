"""XML documents of GCS's XML API: parse those of answers, and write the list of an upload's parts.

An answer may come from any server or proxy that the endpoint reaches. So a document with a document type
declaration, without which there are no entities, is refused before any of it is used.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import Final, NoReturn
from xml.sax.saxutils import escape

_XML: Final = b"<?xml"
_NAMESPACE_END: Final = "}"


class _Builder(ET.TreeBuilder):
    """A builder of trees that refuses a document type declaration."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        """Refuse the declaration, which the parser reports before it reads any entity in it."""
        del name, pubid, system
        raise ValueError("a document type declaration")


def parsed(data: bytes) -> ET.Element | None:
    """Return the root of an XML document, None where ``data`` is not one or declares a document type."""
    parser = ET.XMLParser(target=_Builder())  # noqa: S314 - a DOCTYPE ends it, and callers bound the bytes
    try:
        parser.feed(data)
        root: object = parser.close()
    except (ET.ParseError, ValueError, LookupError):  # of form, declaration and encoding
        return None
    return root if isinstance(root, ET.Element) else None


def name_of(element: ET.Element) -> str:
    """Return the name of an element without its namespace."""
    return element.tag.rpartition(_NAMESPACE_END)[2]


def children(element: ET.Element, name: str) -> Iterable[ET.Element]:
    """Return the children of an element that have a name, in any namespace."""
    return (child for child in element if name_of(child) == name)


def text(element: ET.Element, name: str) -> str:
    """Return the text of the first child of that name, empty where there is none."""
    return next((child.text or "" for child in children(element, name)), "")


def error_of(body: bytes) -> tuple[str, str] | None:
    """Return code and message of an error document, None where ``body`` is something else."""
    start = body.lstrip()
    if not start.startswith((_XML, b"<Error")):
        return None
    root = parsed(start)
    if root is None or name_of(root) != "Error":
        return None
    details = text(root, "Details")
    message = text(root, "Message").strip()
    return text(root, "Code").strip(), f"{message} ({details.strip()})" if details.strip() else message


def parts_list(parts: Iterable[tuple[int, str]]) -> bytes:
    """Return the body that completes an upload, from the numbers and entity tags of its parts."""
    listed = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>" for number, etag in parts
    )
    return f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
