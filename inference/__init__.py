"""Sampling with a base and its adapters: the diffusers pipelines, with our adapter files. Needs no training code."""
