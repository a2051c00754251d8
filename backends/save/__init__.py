"""A save: the writer, the plan of its objects, their uploads, and the commit."""
