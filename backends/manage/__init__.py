"""Management of checkpoints: verify, list contents, delete, collect garbage, set aside."""
