"""One file for each callback, named as users write it."""
