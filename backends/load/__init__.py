"""A load: the reader, the plan of its reads, and reads that ranks of a host share."""
