"""Training noise: how clean latents become a noised sample, a target and a weight."""
