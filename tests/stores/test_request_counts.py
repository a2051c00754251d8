"""Requests that a save, a load, a retention, a gc and a doctor run make on S3 itself, and a save on GCS.

The server is taken for S3 itself, so that nothing is probed. The counts are those of the release before the
probes of other servers were added; each may grow by two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt import doctor
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.stores.s3 import answers as s3_answers
from cloudckpt.retention import Retention, prune
from cloudckpt.run import Run
from support.gcs import GCSServer
from support.places import Place
from support.proxy import Proxy, proxied
from support.servers import S3Server

_MIB = 1 << 20
BEFORE = {"save": 10, "overwrite": 11, "load": 2, "retention": 9, "gc": 6, "doctor": 33}
MORE = 2
CONFIRMED = {"retention": 4}
"""Plain reads before two steps are deleted: the pin of each, and the two steps that stay in their place."""


@pytest.fixture
def place(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Place, Proxy]]:
    monkeypatch.setattr(s3_answers, "_AWS_HOSTS", ("127.0.0.1",))
    with proxied(moto.endpoint) as proxy:
        yield Place.on_server(moto, moto.new_bucket()).behind(proxy.endpoint).child("run"), proxy


def save(place: Place, **options: bool) -> None:
    dcp.save({"w": torch.ones(1000)}, storage_writer=place.writer(**options))


def test_no_operation_makes_more_than_two_requests_more_than_before(place: tuple[Place, Proxy]) -> None:
    run, proxy = place
    target = Target.parse(run.uri, **run.options)
    steps = [run.child(f"step-{step:010d}") for step in range(4)]

    def load() -> None:
        dcp.load({"w": torch.zeros(1000)}, storage_reader=steps[0].reader())

    def save_others() -> None:
        for step in steps[1:]:
            save(step)

    acts: dict[str, Callable[[], object]] = {
        "save": partial(save, steps[0]),
        "overwrite": partial(save, steps[0], overwrite=True),
        "load": load,
        "other saves": save_others,
        "retention": lambda: prune(Run(target), Retention(keep_last=2)),
        "gc": lambda: collect_garbage(target, older_than=timedelta(0)),
        "doctor": lambda: doctor.examine(target),
    }
    counts: dict[str, int] = {}
    for name, act in acts.items():
        proxy.forget()
        act()
        counts[name] = proxy.count
    print(counts)  # noqa: T201 - for the note of a release
    assert all(counts[name] <= BEFORE[name] + MORE + CONFIRMED.get(name, 0) for name in BEFORE), counts


@pytest.mark.parametrize(
    ("xml", "nbytes", "parts"),
    [
        (True, 4000, 1),
        (False, 4000, 1),
        (True, 32 * _MIB, 5),  # the last, of the framing, goes beside the others
        (False, 32 * _MIB, 4),  # the last one has the framing
        (False, 30 * _MIB, 4),
    ],
    ids=["small", "small, session", "large", "large, session", "large and odd, session"],
)
def test_an_object_of_gcs_takes_a_request_for_each_part_and_two_more(
    gcs: GCSServer, xml: bool, nbytes: int, parts: int
) -> None:
    bucket = gcs.new_bucket(xml=xml)
    gcs.reset()
    writer = cloudckpt.StorageWriter(f"gs://{bucket}/run", endpoint_url=gcs.endpoint, part_size=8 * _MIB)
    dcp.save({"w": torch.ones(nbytes // 4)}, storage_writer=writer, no_dist=True)
    made = [
        method
        for method, path, kind in gcs.requests()
        if kind == "resumable" or f"/{bucket}/run/__0_0." in path
    ]
    assert made == ["POST", *["PUT"] * parts, "POST" if xml else "PUT"]
