"""Kinds of sources: a file each, named as in `configs.data_sections.SOURCE_KINDS`; the contract is `data/source.py`."""
