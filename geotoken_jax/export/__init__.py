"""Writes the files of an export: model card, pictures, int8 gallery and programs. `stages.export` calls it."""
