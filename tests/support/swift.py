"""OpenStack Swift with its S3 interface (s3api, SLO), from Debian's packages, without memcached."""

from __future__ import annotations

import contextlib
import getpass
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from support.processes import HOST, again_if_ended_early, daemons, listens, script, unused_ports
from support.s3_server import S3Server

_KEY, _SECRET = "test:tester", "testing"
_PACKAGES = {
    "swift-account-server": "the Debian package swift-account",
    "swift-container-server": "the Debian package swift-container",
    "swift-object-server": "the Debian package swift-object",
    "swift-object-updater": "the Debian package swift-object",
    "swift-proxy-server": "the Debian package swift-proxy",
}
_MIDDLEWARE = (
    *("catch_errors", "gatekeeper", "healthcheck", "cache", "listing_formats", "bulk", "s3api", "tempauth"),
    *("copy", "container-quotas", "account-quotas", "slo", "dlo", "versioned_writes", "symlink"),
)
_SETTINGS = {
    "cache": "memcache_servers = 127.0.0.1:9",  # none: tempauth wants the filter, not the server
    "tempauth": "user_test_tester = testing .admin",
    "s3api": "location = us-east-1",
    "versioned_writes": "allow_versioned_writes = true\nallow_object_versioning = true",
}

# Runs one of Swift's programs with a swift.conf elsewhere than in /etc/swift. The programs' own `swift_dir`
# comes too late: they check /etc/swift/swift.conf before they read it.
_LAUNCHER = """
import runpy, sys
from swift.common import utils
utils.SWIFT_CONF_FILE = sys.argv[1]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_RINGS = """
import json, sys
from swift.common import utils
utils.SWIFT_CONF_FILE = sys.argv[1]
from swift.common.ring import RingBuilder
for kind, port in json.loads(sys.argv[2]).items():
    builder = RingBuilder(4, 1, 1)
    where = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "d", "meta": "", **where})
    builder.rebalance()
    builder.get_ring().save(kind + ".ring.gz")
"""


def swift_server() -> AbstractContextManager[S3Server]:
    """Run account, container, object and proxy server of one node.

    Raises:
        NotInstalledError: One of them is not installed.
    """
    return again_if_ended_early(_started)


@contextlib.contextmanager
def _started() -> Iterator[S3Server]:
    programs = {name: script(name, package) for name, package in _PACKAGES.items()}
    first_line = Path(programs["swift-proxy-server"]).read_text().splitlines()[0]
    python = first_line.removeprefix("#!").strip()  # that of the distribution, which has Swift
    with daemons("swift") as family:
        folder = family.folder
        (folder / "devices" / "d").mkdir(parents=True)
        (folder / "run").mkdir()
        policy = "[storage-policy:0]\nname = p0\ndefault = yes\n"
        settings = "[swift-hash]\nswift_hash_path_suffix = a\nswift_hash_path_prefix = b\n"
        (folder / "swift.conf").write_text(settings + policy)
        port, *others = unused_ports(4)
        ports = dict(zip(("account", "container", "object"), others, strict=True))
        family.call(python, "-c", _RINGS, folder / "swift.conf", json.dumps(ports))
        for kind, own in ports.items():
            (folder / f"{kind}.conf").write_text(_storage_settings(folder, kind, own))
        (folder / "proxy.conf").write_text(_proxy_settings(folder, port))
        run: list[str | Path] = [python, "-c", _LAUNCHER, folder / "swift.conf"]
        storage = [
            (family.start(*run, programs[f"swift-{kind}-server"], folder / f"{kind}.conf"), own)
            for kind, own in ports.items()
        ]
        # Puts a name into a listing where the container server was too slow for the object server.
        family.start(*run, programs["swift-object-updater"], folder / "object.conf")
        family.wait_until(lambda: all(listens(process.pid, own) for process, own in storage))
        proxy = family.start(*run, programs["swift-proxy-server"], folder / "proxy.conf")
        family.wait(proxy, port)
        yield S3Server("swift", f"http://{HOST}:{port}", _KEY, _SECRET, proxy.pid)


def _storage_settings(folder: Path, kind: str, port: int) -> str:
    return f"""
[DEFAULT]
bind_ip = {HOST}
bind_port = {port}
workers = 0
user = {getpass.getuser()}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = healthcheck recon {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:recon]
use = egg:swift#recon
recon_cache_path = {folder}/run
[{kind}-updater]
interval = 5
recon_cache_path = {folder}/run
"""


def _proxy_settings(folder: Path, port: int) -> str:
    filters = "".join(
        f"[filter:{name}]\nuse = egg:swift#{_entry_point(name)}\n{_SETTINGS.get(name, '')}\n"
        for name in _MIDDLEWARE
    )
    return f"""
[DEFAULT]
bind_ip = {HOST}
bind_port = {port}
workers = 0
user = {getpass.getuser()}
swift_dir = {folder}
[pipeline:main]
pipeline = {" ".join(_MIDDLEWARE)} proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
node_timeout = 30
conn_timeout = 5
{filters}
"""


def _entry_point(name: str) -> str:
    return "memcache" if name == "cache" else name.replace("-", "_")
