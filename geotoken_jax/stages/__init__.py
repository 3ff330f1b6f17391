"""The pipeline stages, and studies that run several stages.

A stage reads folders of a work directory and writes one or more other folders there.
"""
