"""Base models: what a family is, the families, their noise, and the embedded base."""
