"""What cloudckpt writes stock DCP reads, and the other way round, bit for bit, at every number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed.checkpoint as dcp

from support import states
from support.places import LIVE, PLACES, S3_PART_SIZE, SOAKED, Place, new_place
from support.ranks import RankPools
from support.servers import S3Server
from support.shortcomings import why_stock_cannot_write_to

OURS = "ours"
STOCK_WRITERS = {
    "stock": {"single_file_per_rank": True, "thread_count": 2},
    "stock, an object an item": {"single_file_per_rank": False, "thread_count": 2},
}
ROUTES = [(OURS, OURS), (OURS, "stock"), *((writer, OURS) for writer in STOCK_WRITERS)]
WRITING_RANKS = 2

Saved = Callable[[str, str], Place]


def save_everything(_rank: int, place: Place, writer: str) -> None:
    storage = place.writer() if writer == OURS else place.stock_writer(**STOCK_WRITERS[writer])
    dcp.save(states.build(states.world_mesh()), storage_writer=storage)


def load_and_compare(_rank: int, place: Place, reader: str) -> None:
    mesh = states.world_mesh()
    loaded = states.blank(mesh)
    storage = place.reader() if reader == OURS else place.stock_reader()
    dcp.load(loaded, storage_reader=storage)
    states.assert_bit_exact(loaded, states.build(mesh))


@pytest.fixture(scope="module")
def saved(
    rank_pool: RankPools,
    s3_server_named: Callable[[str], S3Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Saved:
    """Return a state of everything, saved once by two ranks to one place by one writer."""
    done: dict[tuple[str, str], Place] = {}

    def save(place_name: str, writer: str) -> Place:
        key = place_name, writer
        if key not in done:
            place = new_place(place_name, tmp_path_factory.mktemp("interop"), s3_server_named)
            rank_pool(WRITING_RANKS)(save_everything, place, writer)
            done[key] = place
        return done[key]

    return save


every_place = pytest.mark.parametrize(
    "place_name", [*PLACES, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAKED)]
)


@every_place
@pytest.mark.parametrize("route", ROUTES, ids=" to ".join)
@pytest.mark.parametrize("reading_ranks", [1, 2, 3])
def test_a_state_of_everything_is_loaded_bit_for_bit(  # noqa: PLR0917 - what pytest hands over
    request: pytest.FixtureRequest,
    rank_pool: RankPools,
    saved: Saved,
    place_name: str,
    route: tuple[str, str],
    reading_ranks: int,
) -> None:
    writer, reader = route
    if place_name == LIVE and writer != OURS:
        reason = why_stock_cannot_write_to(Place.named_by_the_user())
        request.applymarker(pytest.mark.xfail(bool(reason), reason=reason, strict=True))
    rank_pool(reading_ranks)(load_and_compare, saved(place_name, writer), reader)


@every_place
@pytest.mark.parametrize("writing_ranks", [1, 3])
def test_what_one_and_three_ranks_write_stock_reads_on_two(
    rank_pool: RankPools,
    s3_server_named: Callable[[str], S3Server],
    tmp_path_factory: pytest.TempPathFactory,
    place_name: str,
    writing_ranks: int,
) -> None:
    place = new_place(place_name, tmp_path_factory.mktemp("interop"), s3_server_named)
    rank_pool(writing_ranks)(save_everything, place, OURS)
    rank_pool(2)(load_and_compare, place, "stock")
    rank_pool(2)(load_and_compare, place, OURS)


@every_place
def test_a_save_leaves_data_objects_and_metadata_and_nothing_else(saved: Saved, place_name: str) -> None:
    place = saved(place_name, OURS)
    names = place.visible()
    assert {name for name in names if not name.endswith(".distcp")} == {".metadata"}
    assert len(names) > WRITING_RANKS
    if place.name != "rclone":  # it cannot list uploads by bucket
        assert place.pending() == set()


def test_the_state_is_large_enough_for_several_parts() -> None:
    assert states.BIG_ROWS << 20 > 2 * WRITING_RANKS * S3_PART_SIZE
