"""Storage for PyTorch Distributed Checkpoint: writer, reader, commit, and one module per store."""
