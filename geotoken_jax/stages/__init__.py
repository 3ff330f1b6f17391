"""The steps of the path, each of which reads a work directory and writes a folder of it."""
