"""Parts of a training state that take more than a ``state_dict``."""
