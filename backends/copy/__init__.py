"""Copying a checkpoint from one store to another, and resuming a copy."""
