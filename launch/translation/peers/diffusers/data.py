"""Images of diffusers' scripts as sources: of DreamBooth, with captions, or of new words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .....configs.errors import UserError
from .....data.sources.folder import image_files
from ...peer import NOTHING, Chosen, Outcome, Rule, Translation, alike, lost, needless, own, same, with_others
from ...values import flag, number, plain, text, whole
from .run import Run

SOURCE = "data.sources.*."
PRIOR = (
    "the loss is the mean over all samples here; there mean(instance) + weight * mean(class), which is twice that: "
    "Adam sees no difference, SGD needs twice the learning rate"
)
COLUMN = "captions in a dataset's column `text` count before it"
TEMPLATES = "one caption here, one of many such sentences there"
SENTENCES = {"object": "a photo of {}", "style": "a painting in the style of {}"}
Values = dict[str, Chosen]


def add_sources(translation: Translation, run: Run) -> None:
    """One source, and class images beside it."""
    source = _images(run)
    source |= {"instance": _instance, "captions": _captions, "words": _words}[run.script.images](run)
    if not run.has_classes:
        translation.sources = [source]
        return
    source.pop("repeats", None)
    share = {"share": _chosen(run, "with_prior_preservation", lambda value: 0.5)}
    translation.sources = [source | share, _classes(run) | share]


def _chosen(run: Run, name: str, make: Callable[[Any], Any] = plain) -> Chosen:
    setting = run.find(name)
    if setting is None:
        raise UserError(f"{run.value('--file', text, '')}: --{name} is missing")
    return Chosen(make(setting.value), setting)


def _given(run: Run, **keys: str) -> Values:
    """Our keys with the values of settings that are given."""
    return {key: _chosen(run, name) for key, name in keys.items() if run.find(name)}


def _images(run: Run) -> Values:
    if run.find("--data"):
        return {"path": _chosen(run, "--data")}
    if run.dataset:
        samples = run.value("max_train_samples", whole, 0)
        split = {"split": _chosen(run, "max_train_samples", lambda value: f"train[:{samples}]")} if samples else {}
        return _given(run, dataset="dataset_name", subset="dataset_config_name", image_column="image_column") | split
    return {"path": _chosen(run, "instance_data_dir" if run.script.images == "instance" else "train_data_dir")}


def _instance(run: Run) -> Values:
    prompt = _given(run, caption="instance_prompt")
    return prompt | _given(run, caption_column="caption_column", repeats="repeats")


def _captions(run: Run) -> Values:
    return _given(run, caption_column="caption_column")


def _words(run: Run) -> Values:
    sentence = SENTENCES.get(run.value("learnable_property", text, "object"), SENTENCES["object"])
    return {"caption": _chosen(run, "placeholder_token", sentence.format)}


def _classes(run: Run) -> Values:
    """A folder that holds enough of them, or images that are made as there."""
    weight = _given(run, loss_weight="prior_loss_weight")
    weight = {key: Chosen(number(each.value), each.setting) for key, each in weight.items()}
    if enough(run):
        return _given(run, path="class_data_dir", caption="class_prompt") | weight
    because = _chosen(run, "with_prior_preservation").setting
    pictures = {"steps": Chosen(50, because), "guidance": Chosen(5.0 if run.script.sdxl else 7.5, because)}
    named = {"prior": _chosen(run, "class_prompt"), "count": _chosen(run, "num_class_images", whole)}
    return named | weight | pictures


def enough(run: Run) -> bool:
    """Whether the folder of class images holds as many as are wanted."""
    folder = Path(run.value("class_data_dir", text, ""))
    wanted = run.value("num_class_images", whole, 0)
    return run.find("class_data_dir") is not None and folder.is_dir() and len(image_files(folder)) >= wanted


def prompt(value: str, run: Run) -> Outcome:
    covered = run.dataset and not run.find("caption_column")
    return Outcome({SOURCE + "caption": value}, COLUMN if covered else "")


def class_folder(value: str, run: Run) -> Outcome:
    if not run.has_classes or enough(run):
        return Outcome({SOURCE + "path": value} if run.has_classes else {})
    return Outcome(differs="it does not hold enough of them: all are made by the base, into the run's folder")


def prior(value: bool, run: Run) -> Outcome:
    return Outcome({SOURCE + "share": 0.5}, PRIOR) if value else NOTHING


def samples(value: int, run: Run) -> Outcome:
    if run.dataset:
        return Outcome({SOURCE + "split": f"train[:{value}]"}, "the first ones here, there drawn ones")
    return Outcome(lost="all images of a folder are trained")


def sentence(value: str, run: Run) -> Outcome:
    return Outcome(differs=TEMPLATES)


def column(value: str, run: Run) -> Outcome:
    return Outcome({SOURCE + "image_column": value} if run.dataset else {})


def repeats(value: int, run: Run) -> Outcome:
    if run.has_classes or run.script.images == "words":
        return Outcome(said="it counts for epochs only")
    return Outcome({SOURCE + "repeats": value})


def crop(value: bool, run: Run) -> Outcome:
    """Squares of the shorter side."""
    if run.script.images == "words":
        return Outcome({"data.crop": "center"}, "" if value else "cut to squares here, there squeezed into them")
    return Outcome({"data.crop": "center" if value else "random"})


RULES: dict[str, Rule] = {
    "instance_data_dir": with_others(SOURCE + "path", text),
    "instance_prompt": own(text, prompt, SOURCE + "caption", COLUMN),
    "train_data_dir": with_others(SOURCE + "path", text),
    "dataset_name": with_others(SOURCE + "dataset", text),
    "dataset_config_name": with_others(SOURCE + "subset", text),
    "image_column": own(text, column, SOURCE + "image_column"),
    "caption_column": with_others(SOURCE + "caption_column", text),
    "max_train_samples": own(whole, samples, SOURCE + "split", "the first ones here, there drawn ones"),
    "repeats": own(whole, repeats, SOURCE + "repeats"),
    "with_prior_preservation": own(flag, prior, SOURCE + "share", PRIOR),
    "prior_loss_weight": with_others(SOURCE + "loss_weight", number),
    "class_data_dir": own(text, class_folder, SOURCE + "path", "all are made anew where it does not hold enough"),
    "class_prompt": with_others(SOURCE + "prior", text),
    "num_class_images": with_others(SOURCE + "count", whole),
    "sample_batch_size": needless("class images are made one by one"),
    "prior_generation_precision": lost("class images are made by the base as `model.dtype` has it"),
    "learnable_property": own(text, sentence, SOURCE + "caption", TEMPLATES),
    "resolution": same("data.resolution", whole),
    "center_crop": own(flag, crop, "data.crop", "for new words: cut to squares here, there squeezed into them"),
    "random_flip": same("data.flip", flag, lambda on: 0.5 if on else 0.0),
    "image_interpolation_mode": lost("images are scaled with Lanczos", "lanczos"),
    "dataloader_num_workers": same("data.workers", whole),
    "cache_dir": lost("$HF_HOME says where downloads go"),
    **alike(lost("not of these models"), "class_labels_conditioning", "text_encoder_use_attention_mask"),
    "validation_images": lost("not of these models"),
    "tokenizer_max_length": lost("windows have the tokenizer's own length: `data.token_windows`", 77),
}
"""Settings of images."""
