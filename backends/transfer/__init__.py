"""Transfers of bytes: what goes into requests, how many run at once, and the memory that they hold."""
