"""The folder of an export: its model card, pictures, int8 gallery and programs. `stages.export` puts it together."""
