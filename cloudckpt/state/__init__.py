"""A training state as users have it, described for DCP and restored from what DCP loads."""
