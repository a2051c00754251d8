"""A single-node Ceph with its Object Gateway (RGW), from Debian's packages, on loopback alone."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from support.processes import HOST, again_if_ended_early, daemons, script, unused_ports
from support.s3_server import S3Server

_KEY, _SECRET = "test", "testtest12"
_PACKAGES = {
    "ceph": "the Debian package ceph-common",
    "ceph-authtool": "the Debian package ceph-common",
    "ceph-mon": "the Debian package ceph-mon",
    "ceph-osd": "the Debian package ceph-osd",
    "monmaptool": "the Debian package ceph-base",
    "radosgw": "the Debian package radosgw",
    "radosgw-admin": "the Debian package radosgw",
}


def ceph_server() -> AbstractContextManager[S3Server]:
    """Run a monitor, an OSD and a gateway, which takes about 15 seconds to come up.

    Raises:
        NotInstalledError: One of them is not installed.
    """
    return again_if_ended_early(_started)


@contextlib.contextmanager
def _started() -> Iterator[S3Server]:
    programs = {name: script(name, package, root=True) for name, package in _PACKAGES.items()}
    with daemons("ceph") as family:
        folder = family.folder
        monitor_port, port = unused_ports(2)
        monitor, cluster = f"[v1:{HOST}:{monitor_port}/0]", str(uuid.uuid4())
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir()
        settings = folder / "ceph.conf"
        settings.write_text(_settings(folder, cluster, monitor, port))

        def run(name: str, *arguments: str | Path) -> str:
            return family.call(programs[name], "-c", settings, *arguments)

        keyring = folder / "keyring"
        every: tuple[str, ...] = ("--cap", "mon", "allow *")
        family.call(programs["ceph-authtool"], "--create-keyring", keyring, "--gen-key", "-n", "mon.", *every)
        every += ("--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        family.call(programs["ceph-authtool"], keyring, "--gen-key", "-n", "client.admin", *every)
        monitors = folder / "monmap"
        family.call(programs["monmaptool"], "--create", "--addv", "a", monitor, "--fsid", cluster, monitors)
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors, "--keyring", keyring)
        family.start(programs["ceph-mon"], "-f", "-c", settings, "-i", "a")
        disk = str(uuid.uuid4())
        number = run("ceph", "osd", "new", disk).strip()
        run("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", disk)
        family.start(programs["ceph-osd"], "-f", "-c", settings, "-i", number)
        gateway = family.start(programs["radosgw"], "-f", "-c", settings, "-n", "client.rgw")
        family.wait(gateway, port)
        user = ("--uid", "test", "--display-name", "test", "--access-key", _KEY, "--secret-key", _SECRET)
        run("radosgw-admin", "-n", "client.admin", "user", "create", *user)
        yield S3Server("ceph", f"http://{HOST}:{port}", _KEY, _SECRET, gateway.pid)


def _settings(folder: Path, cluster: str, monitor: str, port: int) -> str:
    return f"""
[global]
fsid = {cluster}
mon host = {monitor}
mon initial members = a
public addr = {HOST}
cluster addr = {HOST}
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
osd objectstore = bluestore
osd data = {folder}/osd
osd memory target = 1073741824
bluestore block create = true
bluestore block size = 21474836480
bluestore fsck on mount = false
osd op num shards = 2
mon data = {folder}/mon
log file = {folder}/log/$name.log
mon cluster log file = {folder}/log/cluster.log
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
run dir = {folder}/run
keyring = {folder}/keyring
debug ms = 0
[mon]
auth allow insecure global id reclaim = false
[client.rgw]
rgw frontends = beast endpoint={HOST}:{port}
rgw data = {folder}/rgw
rgw enable usage log = false
rgw override bucket index max shards = 1
rgw crypt require ssl = false
rgw thread pool size = 64
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 5
"""
