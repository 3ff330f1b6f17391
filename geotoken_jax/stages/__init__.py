"""The pipeline stages, and the studies that run several of them. A stage reads folders of a work directory and writes
one or more others."""
