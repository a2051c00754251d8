"""The background process that takes a snapshot of the training state and saves it while training goes on."""

from cloudckpt.executor.coordination.rendezvous import ProcessGroupInfo
from cloudckpt.executor.handle import SaveHandle
from cloudckpt.executor.process_executor import ProcessExecutor
from cloudckpt.executor.progress import Progress

__all__ = ["ProcessExecutor", "ProcessGroupInfo", "Progress", "SaveHandle"]
