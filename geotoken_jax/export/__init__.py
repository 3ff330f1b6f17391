"""Writers for the files of an export: model card, pictures, int8 gallery and programs. Called by `stages.export`."""
