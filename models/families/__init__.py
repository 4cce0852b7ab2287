"""One file for each model family, named as users write it in `model.family`."""
