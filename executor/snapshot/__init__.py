"""The snapshot of a state: its layout in shared memory, the copy, and the memory itself."""
