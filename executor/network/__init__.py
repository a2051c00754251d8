"""The network of a job's checkpoint processes: addresses, reachability, and the group that they form."""
