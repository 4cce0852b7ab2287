"""Kinds of sources: one file each, named as `configs.schema.SOURCE_KINDS` has it; the contract is `data/source.py`."""
