"""Layers that do the sums of diffusers' and PEFT's in less time, to rounding; `train.fast` puts them in their place.

Each is a subclass that an existing layer becomes: its parameters, names and state stay. They are used in training mode
alone, so that images sampled on the way have the same bits as those of `loraloom sample`.
"""
