"""How much each noise level counts in the loss, from its signal-to-noise ratio abar / (1 - abar)."""

from torch import Tensor


def min_snr(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """min(SNR, gamma) / SNR for noise, / (SNR + 1) for v   (Hang et al. 2023, equation 11)."""
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def debiased(snr: Tensor, prediction: str) -> Tensor:
    """1 / sqrt(SNR) for noise (Yu et al. 2023); for v the factor SNR / (SNR + 1) between the two errors is added."""
    return snr.rsqrt() if prediction == "epsilon" else snr.sqrt() / (snr + 1)
