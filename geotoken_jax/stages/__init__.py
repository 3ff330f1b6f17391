"""Stages: each makes folders of a work directory, `run(config, workdir, ...)` -> their manifests."""
