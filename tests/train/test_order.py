"""Mappings mean the same wherever a run is written down and read again, in whatever order somebody wrote them."""

import json
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraloom.configs.document import Document
from loraloom.configs.errors import UserError
from loraloom.configs.loader import accepted, dump_yaml, load_config
from loraloom.train.build import build_trainer
from loraloom.train.optim import arrange_as
from loraloom.train.record import ORDERED, Record, hidden, in_order
from loraloom.train.reproduce import Given, config_of
from loraloom.train.state import save_checkpoint

RANKS = {"to_k": 2, "attn1": 3, "text_encoder": 1, "q_proj|k_proj": 2, "unet": 5}
ALPHAS = {"to_k": 64.0, "attn1": 2.0, "unet": 1.0, "text_encoder.*q_proj": 9.0, "text_encoder": 3.0}
PARTS = {"unet": "attention", "text_encoder": "attention"}


def orders(values: dict, least: int = 0) -> st.SearchStrategy[dict]:
    """Some of the entries of a mapping, in any order."""
    chosen = st.lists(st.sampled_from(sorted(values)), unique=True, min_size=least)
    return chosen.map(lambda keys: {key: values[key] for key in keys})


@st.composite
def sections(draw) -> dict[str, dict]:
    """Sections with mappings, as people write them."""
    parts = draw(orders(PARTS, least=2))
    adapter = {"parts": parts, "rank_pattern": draw(orders(RANKS)), "alpha_pattern": draw(orders(ALPHAS, least=2))}
    rates = draw(orders({"unet": {"learning_rate": 1e-2}, "text_encoder": {"learning_rate": 1e-3}}))
    return {"adapter": adapter, "optimizer": {"parts": rates, "lora_plus_ratio": draw(st.sampled_from([1.0, 4.0]))}}


def written(sections: dict[str, dict]) -> dict:
    """A whole config."""
    rest = {"model": {"base": "pocket"}, "data": {"resolution": 64, "sources": [{"path": "photos"}]}}
    return rest | {"loop": {"steps": 3}, "output": {"dir": "run"}} | sections


def orders_of(config) -> list[list[str]]:
    """The keys of the mappings whose order means something."""
    return [list(getattr(config.adapter, place.partition(".")[2]) or ()) for place in ORDERED]


@given(sections())
@settings(max_examples=60, deadline=None)
def test_the_order_of_mappings_is_kept_wherever_a_config_is_written(sections):
    config = accepted(Document(written(sections)), "a config")
    again = accepted(Document(yaml.safe_load(dump_yaml(config))), "config.yaml")
    assert (again, orders_of(again)) == (config, orders_of(config))

    record = json.loads(json.dumps(in_order({"config": hidden(config)})["config"]))
    data = {"sources": [{"name": "x", "images": 1, "sha256": "y"}], "micro_batch": None}
    remade, _ = config_of(Record(record, {"weights": {}}, data, {}, 0), Given(data=["photos"]), "x.safetensors")
    assert (remade.adapter, orders_of(remade)) == (config.adapter, orders_of(config))


@given(sections())
@settings(max_examples=20, deadline=None)
def test_records_differ_by_no_order_that_means_nothing(sections):
    other = sections | {"optimizer": dict(reversed([*sections["optimizer"].items()]))}
    other["optimizer"]["parts"] = dict(reversed([*sections["optimizer"]["parts"].items()]))
    both = [accepted(Document(written(each)), "a config") for each in (sections, other)]
    first, second = (json.dumps(in_order({"config": hidden(config)})) for config in both)
    assert first == second


def optimizer_of(groups: dict[str, dict[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": [*named.values()], "weights": [*named], "name": name} for name, named in groups.items()]
    )


@given(st.permutations("ab"), st.permutations("wxyz"), st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_state_of_a_weight_is_found_by_its_name(groups, weights, old):
    named = {group: {name: torch.nn.Parameter(torch.zeros(2)) for name in "wxyz"} for group in "ab"}
    optimizer = optimizer_of(named)
    for group, each in named.items():
        for name, parameter in each.items():
            parameter.grad = torch.full((2,), float(ord(group) + ord(name)))
    optimizer.step()
    saved = optimizer.state_dict()
    if old:  # as before names of weights were kept: then they are in the order of the model
        weights = "wxyz"
        for group in saved["param_groups"]:
            del group["weights"]
    other = {group: {name: torch.nn.Parameter(torch.zeros(2)) for name in weights} for group in groups}
    resumed = optimizer_of(other)
    arrange_as(resumed, saved["param_groups"])
    resumed.load_state_dict(saved)
    assert [group["name"] for group in resumed.param_groups] == ["a", "b"]
    for group, each in named.items():
        for name, parameter in each.items():
            assert torch.equal(resumed.state[other[group][name]]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_an_optimiser_of_other_weights_is_refused():
    own = optimizer_of({"unet": {"a": torch.nn.Parameter(torch.zeros(1))}})
    for name, weight in (("unet", "b"), ("text_encoder", "a")):
        with pytest.raises(UserError, match=name):
            arrange_as(own, [{"name": name, "weights": [weight], "params": [0]}])


def resumes_exactly(config, *, as_old: bool = False) -> None:
    """Whether steps 2 and 3 after a stop are those of a straight run; `as_old` as folders were written once."""
    shutil.rmtree(config.output.dir, ignore_errors=True)  # of the example before
    straight = build_trainer(config)
    straight.callbacks = []
    straight.train_step()
    checkpoint, folder = save_checkpoint(straight.run), straight.run.folder
    for _ in range(2):
        straight.train_step()
    if as_old:
        content = yaml.safe_load((folder / "config.yaml").read_text())
        content["adapter"]["parts"] = dict(sorted(content["adapter"]["parts"].items()))
        (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
        for group in state["param_groups"]:
            del group["weights"]
        torch.save(state, checkpoint / "optimizer.bin")
    resumed = build_trainer(load_config(folder / "config.yaml"), checkpoint=checkpoint)
    resumed.callbacks = []
    results = [result for _ in range(2) for result in resumed.train_step()]
    assert resumed.run.step == straight.run.step == 3
    assert len(results) == 2
    weights = [trainer.run.adapters.named_parameters() for trainer in (straight, resumed)]
    for part, named in weights[0].items():
        for name, parameter in named.items():
            assert torch.equal(parameter, weights[1][part][name]), f"{part}.{name}"


@pytest.mark.slow
@given(sections=sections(), as_old=st.booleans())
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_with_mappings_in_any_order_resumes_to_the_same_bits(write_config, sections, as_old):
    loop = {"steps": 3, "threads": 1}
    resumes_exactly(load_config(write_config(**sections, loop=loop), []), as_old=as_old)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pocket/dreambooth.yaml"])
def test_shipped_recipes_resume_as_they_are_written(name, photos, tmp_path):
    sources = [{"path": str(photos), "caption": "a sks creature"}, {"prior": "a creature", "count": 2, "steps": 1}]
    given = [f"data.sources={json.dumps(sources)}", f"output.dir={tmp_path / 'run'}", "loop.steps=3"]
    resumes_exactly(load_config(name, given))
