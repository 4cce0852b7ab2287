"""Pipelines of our own, one file each: file name = the name that `load_pipeline` takes."""
