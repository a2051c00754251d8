"""Objects in a folder of a file system."""
