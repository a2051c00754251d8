"""The figures of what grows are those of real commits: what the generator makes reads back whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

import cloudckpt
from bench.growth import planned, tensor_names, written
from cloudckpt.backends.format import metadata as md

_TESTS = Path(__file__).parents[1]


def test_what_the_generator_writes_commits_to_a_checkpoint_with_every_item(tmp_path: Path) -> None:
    ranks, names = 5, tensor_names(7)
    uri = tmp_path.as_uri()
    writer = cloudckpt.StorageWriter(uri)
    plans, metadata = planned(ranks, names)
    writer.finish(metadata, written(writer, plans))
    read = cloudckpt.StorageReader(uri).read_metadata()
    assert set(read.state_dict_metadata) == set(names)
    algorithm = md.algorithms_of(read)
    for name, entry in read.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        assert [chunk.offsets[0] for chunk in entry.chunks] == [4 * rank for rank in range(ranks)]
        for chunk in entry.chunks:
            info = read.storage_data[MetadataIndex(name, chunk.offsets)]
            assert md.payload_of(info) is not None
            assert md.checks_of(info, algorithm) is not None
    assert len(read.storage_data) == ranks * len(names)
    assert len(md.objects_of(read)) == ranks * 3
    assert cloudckpt.verify(uri).ok


def test_names_are_a_models_and_its_optimizers() -> None:
    names = tensor_names(300)
    assert len(set(names)) == 300
    assert names[:3] == [
        "model.layers.0.attention.wq.weight",
        "optimizer.state.layers.0.attention.wq.weight.exp_avg",
        "optimizer.state.layers.0.attention.wq.weight.exp_avg_sq",
    ]


def test_every_size_and_number_of_ranks_is_measured(tmp_path: Path) -> None:
    written_to, document = tmp_path / "growth.json", tmp_path / "growth.md"
    sizes = ("--gib", "0.03125", "0.0625", "--repeats=1", "--ranks", "1", "3", "--tensors=4")
    ran = subprocess.run(
        [sys.executable, "-m", "bench.growth", *sizes, f"--json={written_to}", f"--markdown={document}"],
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    found = json.loads(written_to.read_text())
    assert [save["tensors"] for save in found["saves"]] == [1, 2]
    assert [(one["ranks"], one["items"], one["objects"]) for one in found["finishes"]] == [
        (1, 4, 3),
        (3, 12, 9),
    ]
    for figures in found["saves"] + found["finishes"]:
        assert figures["requests"] > 0
        assert all(cost["wall"] > 0 for cost in figures["finish"].values() if isinstance(cost, dict))
    few, more = found["finishes"]
    # Each object is completed and looked at twice, and each further rank looks for a committed checkpoint.
    assert more["requests"] - few["requests"] == 3 * 6 + 2
    assert more["finish"]["metadata_bytes"] > few["finish"]["metadata_bytes"]
    text = document.read_text()
    assert text.count("**") == 6, "three tables"
    assert "3 ranks: " in text
