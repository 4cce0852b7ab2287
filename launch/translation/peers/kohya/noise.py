"""sd-scripts' noise and loss."""

from ...peer import NOTHING, Outcome, Rule, lost, own, same, switch, with_others
from ...values import flag, number, text, whole
from .run import Run

EXPONENTIAL = "the delta falls with the signal-to-noise ratio here, there exponentially over the timesteps"
OCTAVES = "each octave is half as fine here; there by a random factor of 2 to 4, and the finest counts twice"
CHECKED = "checked, not set: the base's scheduler has to say it"
STRENGTH = "the strength is the same for each sample"
ROBUST = ("huber", "smooth_l1")


def kind(value: str, run: Run) -> Outcome:
    """With its delta, which sd-scripts lets fall unless it is told something else."""
    if value not in ROBUST:
        found = "the squared error is trained; `loss.kind: huber` grows as slowly for outliers" if value == "l1" else ""
        return Outcome(lost=found) if found else Outcome({"loss.kind": "mse" if value == "l2" else value})
    delta = run.value("huber_c", number, 0.1)
    constant = run.value("huber_schedule", text, "snr") == "constant"
    delta *= run.value("huber_scale", number, 1.0) if constant else 1.0
    return Outcome(
        {
            "loss.kind": value,
            "loss.options.delta": delta,
            "loss.options.delta_schedule": "constant" if constant else "snr",
        }
    )


def fall(value: str, run: Run) -> Outcome:
    used = run.value("loss_type", text, "l2") in ROBUST
    return Outcome(differs=EXPONENTIAL) if used and value == "exponential" else NOTHING


def debiased(value: bool, run: Run) -> Outcome:
    if value and run.value("min_snr_gamma", number, 0.0):
        return Outcome(lost="`min_snr_gamma` weights the same levels: there is one weight here")
    words = "v is weighted by sqrt(SNR) / (SNR + 1) here, there by 1 / (SNR + 1)"
    return Outcome({"noise.debiased": value}, words if value and run.asked("v_parameterization") else "")


def octaves(value: int, run: Run) -> Outcome:
    """The first iteration of sd-scripts adds noise that is as fine as the noise itself."""
    return Outcome({"noise.multires_octaves": min(10, value - 1)}, OCTAVES) if value else NOTHING


def last(value: int, run: Run) -> Outcome:
    return Outcome({"noise.max_timestep": value - 1}) if value else NOTHING


def min_snr(value: float, run: Run) -> Outcome:
    return Outcome({"noise.min_snr_gamma": value}) if value else NOTHING


RULES: dict[str, Rule] = {
    "v_parameterization": switch({"noise.prediction": "v_prediction"}, CHECKED),
    "zero_terminal_snr": same("noise.zero_terminal_snr", flag),
    "min_timestep": same("noise.min_timestep", whole),
    "max_timestep": own(whole, last, "noise.max_timestep", "the last one that is trained; there the first that is not"),
    "noise_offset": same("noise.offset", number),
    "noise_offset_random_strength": lost(STRENGTH),
    "adaptive_noise_scale": lost("the offset does not depend on the image"),
    "multires_noise_iterations": own(whole, octaves, "noise.multires_octaves", OCTAVES),
    "multires_noise_discount": same("noise.multires_discount", number),
    "ip_noise_gamma": same("noise.input_perturbation", number),
    "ip_noise_gamma_random_strength": lost(STRENGTH),
    "min_snr_gamma": own(number, min_snr, "noise.min_snr_gamma"),
    "debiased_estimation_loss": own(flag, debiased, "noise.debiased"),
    "scale_v_pred_loss_like_noise_pred": lost("losses of v have no such weight; `noise.min_snr_gamma` is one"),
    "v_pred_like_loss": lost("losses have no such part; `noise.min_snr_gamma` weights noise levels"),
    "loss_type": own(text, kind, "loss.kind"),
    "huber_c": with_others("loss.options.delta", number),
    "huber_scale": with_others("loss.options.delta", number),
    "huber_schedule": own(text, fall, "loss.options.delta_schedule", "`exponential` becomes `snr`"),
}
"""Settings of noise and loss."""
