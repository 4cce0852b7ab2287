"""The kinds of loss: a file for each, named as in `loss.kind`; the contract is `train/loss.py`."""
