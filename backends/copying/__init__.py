"""Copying a checkpoint: what is read, how its bytes move, and how that goes on after a kill."""
