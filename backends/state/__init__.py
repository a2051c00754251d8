"""A training state as DCP stores it: flat names, containers, values, and the planners for them."""
