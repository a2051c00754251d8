"""Forms of a state other than a checkpoint: how each is read where it lies, and how it is written."""
