"""Logs, limits, descriptors and tracebacks of this process."""
