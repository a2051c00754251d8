"""A rank that destroys its process group while saves are under way, and waits for them after it."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

import cloudckpt


def main(uri: str) -> None:
    torch.set_num_threads(1)
    state = {"weights": torch.ones(1 << 20)}
    checkpointer = cloudckpt.Checkpointer(uri, start_timeout=100.0)
    checkpointer.wait()
    said: dict[str, object] = {"before": checkpointer.latest_step()}
    dist.init_process_group("gloo")
    said["shows"] = checkpointer._display() is not None
    handles = [checkpointer.async_save(step, state) for step in (1, 2)]
    dist.destroy_process_group()
    checkpointer.wait()
    said["steps"] = [handle.result().step for handle in handles]
    try:
        said["saved"] = checkpointer.save(3, state).step
    except cloudckpt.ExecutorError as error:
        said["refused"] = str(error)
    said["loaded"] = checkpointer.load({"weights": torch.zeros(1 << 20)})
    checkpointer.close()
    print(json.dumps(said))  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main(sys.argv[1])
