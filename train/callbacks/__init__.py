"""One file for each thing that happens around the loop."""
