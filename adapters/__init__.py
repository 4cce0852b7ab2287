"""Trained adapters: their one in-memory form (`artifact`) and the file formats they are written in (`format`)."""
