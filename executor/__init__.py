"""The background process that takes a snapshot of the training state and saves it while training goes on."""

from cloudckpt.executor.coordination.rendezvous import ProcessGroupInfo
from cloudckpt.executor.process_executor import ProcessExecutor
from cloudckpt.executor.progress import Progress
from cloudckpt.executor.save_handle import SaveHandle

__all__ = ["ProcessExecutor", "ProcessGroupInfo", "Progress", "SaveHandle"]
