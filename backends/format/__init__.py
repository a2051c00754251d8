"""The format on disk: `.metadata`, the archives around tensors, and bounded readers of both."""
