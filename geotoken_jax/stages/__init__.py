"""The pipeline stages. Every stage reads folders of a work directory and writes one of its folders."""
