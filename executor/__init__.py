"""The background process that takes a snapshot of the training state and saves it while training goes on.

Nothing is here yet: the process arrives in a later release. Until then a save runs in the training process,
or in the process that `torch.distributed.checkpoint.async_save` starts.
"""
