"""The peers that are compared: each saves a state through DCP under a name and loads it from there.

Every option that costs or saves time is left at the peer's own default, concurrency too: eight requests
for cloudckpt; for the others one thread, which is the default of DCP's writers, and whatever their clients do
below it. Two exceptions:

- Those that write through DCP's ``FsspecWriter`` are told ``sync_files=False``, as s3torchconnector's writer
  tells itself. What they write to is no file, and DCP would flush every disk of the machine instead.
- ``cloudckpt, 256 MiB`` is cloudckpt with that ``memory_limit``, for the sake of the column of memory.

What a peer needs is imported by the process that measures it, and by no other.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

import cloudckpt
from bench.distance import Distance
from bench.floor import Wire
from bench.states import State, bytes_of
from support.dcp_fsspec import FsspecReader, FsspecWriter
from support.gcs import GCSServer
from support.servers import S3Server


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer saves: a bucket of its own on the server that all share, or a folder."""

    server: S3Server | GCSServer
    """With the endpoint by which peers reach it."""
    bucket: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables of the peer's process, beside those of an S3 server."""
    namespace: str | None = None
    """The network namespace of the peer's process."""

    def uri(self, name: str) -> str:
        return f"{'s3' if isinstance(self.server, S3Server) else 'gs'}://{self.bucket}/{name}"

    @property
    def s3(self) -> S3Server:
        """The server, which is one of S3."""
        assert isinstance(self.server, S3Server)
        return self.server

    def variables(self) -> dict[str, str]:
        """All variables of the peer's process."""
        own = self.server.environment if isinstance(self.server, S3Server) else {}
        return {**own, **self.environment}


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to save and to load."""

    save: Callable[[State, str], object]
    load: Callable[[State, str], object]
    prepare: Callable[[State], object] = lambda _: None
    """Sees the state just before, and is not measured."""
    moves_plain_values: bool = True
    """Whether it carries numbers and strings too, or tensors alone."""
    fills_tensors: bool = True
    """False: it moves as many bytes, and there is nothing to compare."""


Opened = Callable[[Place], AbstractContextManager[Peer]]


def through_dcp(
    writer: Callable[[str], dcp.StorageWriter], reader: Callable[[str], dcp.StorageReader]
) -> Peer:
    """Return a peer of DCP's own. Making the writer or the reader is part of what is measured: a training
    run makes one a checkpoint."""
    return Peer(
        save=lambda state, name: dcp.save(state, storage_writer=writer(name), no_dist=True),
        load=lambda state, name: dcp.load(state, storage_reader=reader(name), no_dist=True),
    )


@contextmanager
def cloudckpt_at(reached: Callable[[Place], dict[str, Any]], place: Place, **options: Any) -> Iterator[Peer]:
    """Checksums on and verified, as they are unless told otherwise.

    ``reached`` returns the options by which the place is reached.
    """
    options |= reached(place)
    yield through_dcp(
        lambda name: cloudckpt.StorageWriter(place.uri(name), **options),
        lambda name: cloudckpt.StorageReader(place.uri(name), **options),
    )


def _reached(place: Place) -> dict[str, Any]:
    server = place.s3
    return {
        "endpoint_url": server.endpoint,
        "region": "us-east-1",
        "storage_options": server.storage_options,
    }


@contextmanager
def s3torchconnector(place: Place) -> Iterator[Peer]:
    """It has no argument for the endpoint, and takes it from the environment: see ``bench.worker``."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

    config = S3ClientConfig(force_path_style=True)
    yield through_dcp(
        lambda name: S3StorageWriter("us-east-1", place.uri(name), s3client_config=config),
        lambda name: S3StorageReader("us-east-1", place.uri(name), s3client_config=config),
    )


def through_fsspec(place: Place, **options: Any) -> Peer:
    """Return a peer through the file system that fsspec has under the URI's name."""
    return through_dcp(
        lambda name: FsspecWriter(place.uri(name), sync_files=False, **options),
        lambda name: FsspecReader(place.uri(name), **options),
    )


@contextmanager
def obstore(place: Place) -> Iterator[Peer]:
    """obstore's file system under fsspec's name for S3, which is how DCP comes by a file system.

    Its files keep references to the buffers that they are given, and upload them later. torch's writer of
    archives gives them the same small buffer again and again. So, with obstore 0.12, the archives' headers
    are stored as something else, and what was saved doesn't load. Saving costs what it costs all the same.
    """
    from obstore.fsspec import register

    register("s3")
    server = place.s3
    yield through_fsspec(
        place,
        endpoint=server.endpoint,
        region="us-east-1",
        access_key_id=server.key,
        secret_access_key=server.secret,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


@contextmanager
def s3fs(place: Place) -> Iterator[Peer]:
    yield through_fsspec(place, endpoint_url=place.s3.endpoint, **place.s3.storage_options)


@contextmanager
def folder(place: Place) -> Iterator[Peer]:
    """DCP's own files. There is no wire, and no server that would need a core."""
    yield through_dcp(
        lambda name: dcp.FileSystemWriter(place.folder / name),
        lambda name: dcp.FileSystemReader(place.folder / name),
    )


@contextmanager
def wire_floor(place: Place) -> Iterator[Peer]:
    wire = Wire(place.server.endpoint, place.bucket)
    yield Peer(wire.save, wire.load, wire.prepare, moves_plain_values=False)


@contextmanager
def curl(place: Place) -> Iterator[Peer]:
    """One connection of a native program, which sends and receives as many bytes as the state has."""
    body = place.folder / "body"
    trusted = place.environment.get("SSL_CERT_FILE")
    command = ["curl", "--silent", "--fail", *(["--cacert", trusted] if trusted else [])]

    def url(name: str) -> str:
        return f"{place.server.endpoint}/{place.bucket}/{name}"

    def prepare(state: State) -> None:
        if not body.exists() or body.stat().st_size != bytes_of(state):
            with body.open("wb") as file:
                file.truncate(bytes_of(state))
            body.read_bytes()  # a hole has no pages

    def call(*arguments: str) -> None:
        subprocess.run([*command, *arguments], check=True)

    yield Peer(
        lambda _, name: call("--upload-file", str(body), url(name)),
        lambda _, name: call("--output", os.devnull, url(name)),
        prepare,
        fills_tensors=False,
    )


OURS = "cloudckpt"
LIMITED = "cloudckpt, 256 MiB"
S3FS = "s3fs"
FOLDER = "folder"
FLOOR = "wire floor"
CURL = "curl"

PEERS: Mapping[str, Opened] = {
    OURS: partial(cloudckpt_at, _reached),
    LIMITED: partial(cloudckpt_at, _reached, memory_limit="256MiB"),
    "s3torchconnector": s3torchconnector,
    "obstore": obstore,
    S3FS: s3fs,
    FOLDER: folder,
    FLOOR: wire_floor,
    CURL: curl,
}


def set_by_environment() -> dict[str, str]:
    """Options of cloudckpt that the environment sets, so that the figures are not of its defaults."""
    return {name: value for name, value in os.environ.items() if name.startswith("CLOUDCKPT_")}


def peers_for(
    shape_name: str, chosen: Mapping[str, Opened] = PEERS, distance: Distance | None = None
) -> dict[str, Opened]:
    """Return the peers that take part on a state, at a distance.

    The limited cloudckpt and curl, which has no tensors, take part on the large one alone. What has one
    connection takes minutes far away, and says nothing that it doesn't say near. The wire floor speaks no
    TLS.
    """
    distance = distance or Distance()
    left_out = set[str]()
    if shape_name != "large":
        left_out |= {LIMITED, CURL}
    if distance.link is not None:
        left_out |= {S3FS, CURL, FOLDER}
    if distance.tls:
        left_out |= {FLOOR, FOLDER}
    return {name: opened for name, opened in chosen.items() if name not in left_out}
