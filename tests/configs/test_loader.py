"""A YAML file becomes a config, or every mistake in it is named with its place."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.configs import loader
from loraloom.configs.data_sections import FolderSource, PriorSource
from loraloom.configs.document import dotted
from loraloom.configs.errors import UserError
from loraloom.configs.loader import dump_yaml, given_yaml, load_config, marked_yaml
from loraloom.configs.paths import expanded
from loraloom.configs.problems import known_keys
from loraloom.configs.schema import RunConfig

GOOD = """\
model: {base: pocket}
data:
  resolution: 64
  sources:
    - {path: photos, caption: a sks dog, share: 0.5}
    - {prior: a dog, count: 64, share: 0.5}
loop:
  steps: 10
output:
  dir: runs/dog
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD)
    return tmp_path


def load(text: str, *overrides: str) -> RunConfig:
    Path("my.yaml").write_text(text)
    return load_config("my.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return caught.value.problems


def test_values_come_from_the_file_and_defaults_from_the_schema(folder: Path) -> None:
    config = load(GOOD)
    instance, prior = config.data.sources
    assert isinstance(instance, FolderSource)
    assert isinstance(prior, PriorSource)
    assert (config.data.resolution, instance.caption, prior.count, config.adapter.rank) == (64, "a sks dog", 64, 8)


def test_numbers_and_words_are_read_as_yaml_1_2(folder: Path) -> None:
    config = load(
        "extends: good\noptimizer: {learning_rate: 1e-4, weight_decay: 5E-3}\n"
        "loop: {precision: no, deterministic: yes, steps: 1e2}\nmodel: {revision: 2024-01-01}\n"
    )
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.loop.steps) == (1e-4, 5e-3, 100)
    assert (config.loop.precision, config.loop.deterministic, config.model.revision) == ("no", True, "2024-01-01")
    assert load(GOOD, "loop.precision=false").loop.precision == "no"


def test_extends_merges_mappings_and_replaces_lists(folder: Path) -> None:
    Path("middle.yaml").write_text("extends: good.yaml\nloop: {seed: 3}\nvalidation: {prompts: [a, b]}\n")
    config = load(
        "extends: middle\nloop: {batch_size: 2}\nvalidation: {prompts: [c]}\n"
        "data: {sources: [{path: other, caption: a cat}]}\n"
    )
    assert (config.loop.steps, config.loop.seed, config.loop.batch_size) == (10, 3, 2)
    assert config.validation.prompts == ["c"]
    assert [source.model_dump()["path"] for source in config.data.sources] == ["other"]
    assert config.data.resolution == 64


def test_a_shipped_name_can_be_extended_and_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "shipped" / "tiny").mkdir(parents=True)
    (folder / "shipped" / "tiny" / "base.yaml").write_text(GOOD)
    (folder / "shipped" / "tiny" / "more.yaml").write_text("extends: base.yaml\nloop: {seed: 5}\n")
    monkeypatch.setattr(loader, "SHIPPED", folder / "shipped")
    assert load("extends: tiny/more\n").loop.seed == 5
    assert load_config("tiny/more").loop.steps == 10
    assert problems("extends: tiny/mor\n") == [
        'my.yaml:1: extends: tiny/mor: no such file (did you mean "tiny/more"?); shipped: tiny/base, tiny/more'
    ]


def test_overrides_reach_sections_list_items_and_mappings(folder: Path) -> None:
    config = load(
        GOOD,
        "adapter.rank=16",
        "data.sources.0.path=x",
        "adapter.parts={text_encoder: attention}",
        "validation.prompts=[a, 'b: c']",
        "loop.micro_batch=null",
        "model.revision=a=b",
    )
    assert config.adapter.rank == 16
    assert config.data.sources[0].model_dump()["path"] == "x"
    assert config.adapter.parts == {"text_encoder": "attention"}
    assert config.validation.prompts == ["a", "b: c"]
    assert config.model.revision == "a=b"
    merged = load(GOOD + "adapter: {parts: {unet: attention}}\n", "adapter.parts={text_encoder: attention}")
    assert merged.adapter.parts == {"unet": "attention", "text_encoder": "attention"}


def test_all_problems_are_named_at_once_with_their_lines(folder: Path) -> None:
    text = """\
extends: good
learning_rate: 1e-4
adapter:
  rank: 0
  method: lroa
  alpha: 2
  alpha: 3
  parts: {unet: attention}
optimizer:
  learnig_rate: 1
  learning_rate: -1
  weight_decay: .nan
  parts: {unt: {learning_rate: 1e-4}}
loop:
  steps: 0
  batch_size: 5
  micro_batch: 2
  sead: many
model: {dtype: fp61, base: 5}
output: {formats: [diffusers, koyha], name: a b}
noise:
"""
    assert problems(text, "adaptr.rank=4", "loop.threads=many", "rank", "loop.steps.x=1", "data.sources.2.path=x") == [
        'my.yaml:2: learning_rate: unknown key (did you mean "optimizer.learning_rate"?)',
        "my.yaml:4: adapter.rank: should be greater than or equal to 1, found 0",
        'my.yaml:5: adapter.method: "lroa" is unknown (did you mean "lora"?); there are: '
        "full, loha, lokr, lora, oft, textual_inversion",
        "my.yaml:7: adapter.alpha: given twice, in line 6 and in line 7",
        'my.yaml:10: optimizer.learnig_rate: unknown key (did you mean "learning_rate"?)',
        "my.yaml:11: optimizer.learning_rate: should be greater than 0, found -1",
        "my.yaml:12: optimizer.weight_decay: should be a finite number, found NaN",
        'my.yaml:13: optimizer.parts.unt: is not trained (did you mean "unet"?); adapter.parts has: unet',
        "my.yaml:15: loop.steps: should be greater than or equal to 1, found 0",
        "my.yaml:16: loop.batch_size: should be divisible by loop.micro_batch = 2, found 5",
        'my.yaml:18: loop.sead: unknown key (did you mean "seed"?)',
        "my.yaml:19: model.base: should be text (put it in quotes), found 5",
        "my.yaml:19: model.dtype: should be 'fp32', 'bf16' or 'fp16', found \"fp61\" (did you mean \"fp16\"?)",
        "my.yaml:20: output.name: should match pattern '^[\\w.-]+$', found \"a b\"",
        'my.yaml:20: output.formats.1: "koyha" is unknown (did you mean "kohya"?); '
        "there are: diffusers, embedding, kohya, loraloom, peft",
        "my.yaml:21: noise: should be a section (`key: value` lines), found nothing",
        "command line: rank: should be key=value, such as adapter.rank=16",
        "command line: loop.steps.x: loop.steps is 0, which has no keys of its own",
        "command line: data.sources.2.path: data.sources has 2 items: the first is data.sources.0",
        'command line: loop.threads: should be a whole number, found "many"',
        'command line: adaptr: unknown key (did you mean "adapter"?)',
    ]


def test_keys_that_are_to_be_merged_are_told_to_be_written_out(folder: Path) -> None:
    found = problems(
        "extends: good\ndata:\n  sources:\n    - {<<: {path: photos}, caption: x}\n<<: {loop: {seed: 1}}\n"
    )
    assert [problem.partition(",")[0] for problem in found if "<<" in problem] == [
        "my.yaml:4: data.sources.0.<<: unknown key",
        "my.yaml:5: <<: unknown key",
    ]
    assert all("write the keys out" in problem for problem in found if "<<" in problem)


def test_a_problem_is_named_in_the_file_that_holds_it(folder: Path) -> None:
    Path("base.yaml").write_text(GOOD.replace("steps: 10", "stepz: 10\n  steps: 10"))
    assert problems("\n\nextends: base\n") == ['base.yaml:8: loop.stepz: unknown key (did you mean "steps"?)']


def test_a_missing_key_is_looked_for_where_the_list_was_replaced(folder: Path) -> None:
    assert problems("extends: good\ndata:\n  sources:\n    - caption: other\n") == [
        "my.yaml:4: data.sources.0.path: is missing; it has no default (Folder with images. A caption file may hold "
        "several captions, one on each line)"
    ]


def test_a_key_of_another_kind_of_source(folder: Path) -> None:
    assert problems("extends: good\ndata:\n  sources:\n    - {path: a, caption: b, count: 4}\n") == [
        "my.yaml:4: data.sources.0.count: unknown key in an entry without `prior`"
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [("seed", '"loop.seed" or "validation.seed"'), ("rnak", '"adapter.rank"'), ("lop", '"loop"')],
)
def test_a_key_at_the_top_is_looked_for_in_the_sections(folder: Path, key: str, meant: str) -> None:
    assert problems(f"{GOOD}{key}: 1\n") == [f"my.yaml:11: {key}: unknown key (did you mean {meant}?)"]


def test_shares_must_add_up(folder: Path) -> None:
    assert problems(GOOD, "data.sources.0.share=0.4") == [
        "my.yaml:2: data: the shares of the sources add up to 0.9, not to 1"
    ]


def test_options_are_checked_by_the_method(folder: Path) -> None:
    assert load(GOOD + "adapter: {options: {dropout: 1e-1}}\n").adapter.options == {"dropout": 0.1}
    assert problems(GOOD + "adapter:\n  options:\n    dropuot: 0.1\n    dropout: 1.0\n") == [
        'my.yaml:13: adapter.options.dropuot: unknown key (did you mean "dropout"?)',
        "my.yaml:14: adapter.options.dropout: should be less than 1, found 1.0",
    ]


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"", "my.yaml: the file is empty"),
        (b"# only a comment\n", "my.yaml: the file is empty"),
        (b"- a\n", "my.yaml:1: a config is a mapping (`section:` and `key: value` lines), found a list"),
        (b"a\n", "my.yaml:1: a config is a mapping (`section:` and `key: value` lines), found one value"),
        (b"a: 1\nb: [1\nc: 2\n", "my.yaml:3: not valid YAML"),
        (b"a: 1\n\tb: 2\n", "my.yaml:2: not valid YAML"),
        (
            b'a: "C:\\Users\\x"\n',
            "my.yaml:1: not valid YAML: while scanning a double-quoted scalar, expected escape sequence of 8 "
            "hexadecimal numbers, but found 's'; a path with backslashes stands in single quotes",
        ),
        (b"a: 1\n---\nb: 2\n", "my.yaml:2: not valid YAML: expected a single document"),
        (b"a: 1\nb: caf\xe9\n", "my.yaml:2: not UTF-8 text (byte 0xe9)"),
        (b"a: 1\nb: \x07\n", "my.yaml:2: not valid YAML: the character '\\x07'"),
        (b"extends: 3\n", "my.yaml:1: extends: should be the name of one file, found 3"),
        (b"extends: goood\n", 'my.yaml:1: extends: goood: no such file (did you mean "good"?)'),
        (b"\nextends: my\n", "my.yaml:2: extends: a circle: my.yaml -> my.yaml"),
    ],
)
def test_what_cannot_be_read_is_answered_in_one_line(folder: Path, content: bytes, answer: str) -> None:
    Path("my.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config("my.yaml")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(answer)


@pytest.mark.parametrize(
    ("path", "answer"),
    [("good.yml", "no such file"), ("godo.yaml", 'did you mean "good.yaml"?'), (".", "a folder; name a YAML file")],
)
def test_a_file_that_is_not_there(folder: Path, path: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer.replace("?", r"\?")):
        load_config(path)


def test_what_no_file_of_a_config_can_be_is_said(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    (folder / "circle.yaml").symlink_to("circle.yaml")
    for name, answer in {"pipe.yaml": "is no regular file", "pipe": "is no regular file", "circle": "symbolic"}.items():
        with pytest.raises(UserError, match=answer):
            load_config(name)
    for number in range(22):
        (folder / f"e{number}.yaml").write_text(f"extends: e{number + 1}\n")
    (folder / "e22.yaml").write_text(GOOD)
    assert load_config("e3.yaml") == load_config("e22.yaml")
    with pytest.raises(UserError, match="more than 20 files extend one another"):
        load_config("e0.yaml")


def test_a_number_that_cannot_be_read_is_one_line(folder: Path) -> None:
    (folder / "my.yaml").write_text(GOOD)
    for override in ("validation.seed=99999999999999999999", "loop={steps: 99999999999999999999}"):
        with pytest.raises(UserError) as caught:
            load_config("my.yaml", [override])
        assert len(caught.value.problems) == 1 and "is too large" in str(caught.value)
    assert str(caught.value).startswith("command line: loop.steps: the number")


def test_values_that_are_not_plain(folder: Path) -> None:
    found = problems(
        GOOD + "validation:\n  prompts: &p [*p]\nnoise: {offset: !!python/object:os.system 1}\n? [a]\n: 1\n"
    )
    assert "my.yaml:12: validation.prompts.0: an alias to a value that contains the alias" in found
    assert any(line.startswith("my.yaml:13: noise.offset: the tag ") for line in found)
    assert "my.yaml:14: a list or a mapping as a key; a key is a word" in found


TRICKY = [
    "no",
    "true",
    "1e-4",
    "1_000",
    "0x10",
    "1:30",
    "~",
    "null",
    "2024-01-01",
    "a: b",
    "# a",
    "- a",
    "<<",
    "=",
    "*a",
]
TEXT = st.one_of(
    st.sampled_from([*TRICKY, "a\nb\n", "\ufeff", "\x85", "'", '"', " a ", "{a}", ","]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\x85\u2028\u2029"), min_size=1),
)


def is_path(text: str) -> bool:
    try:
        return bool(expanded(text))
    except UserError:
        return False


PATH = TEXT.filter(is_path)
REVISION = st.sampled_from(["no", "007", "1e5", "a=b", "null", "refs/pr/1", "0x10", "#a"])
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    parts = draw(st.dictionaries(TEXT, TEXT, min_size=1, max_size=3))
    micro_batch = draw(st.integers(1, 8))
    shares = draw(st.sampled_from([(None, None), (0.5, 0.5), (0.1, 0.9)]))
    tree: dict[str, Any] = {
        "model": {"base": draw(PATH), "revision": draw(st.none() | REVISION), "dtype": "bf16"},
        "data": {
            "sources": [
                {"path": draw(PATH), "caption": draw(TEXT), "share": shares[0], "loss_weight": draw(POSITIVE)},
                {"prior": draw(TEXT), "count": draw(st.integers(1, 100_000)), "share": shares[1]},
            ]
        },
        "adapter": {"alpha": draw(POSITIVE), "parts": parts, "options": {"dropout": draw(st.floats(0, 0.99))}},
        "optimizer": {"learning_rate": draw(POSITIVE), "parts": {next(iter(parts)): {"learning_rate": draw(POSITIVE)}}},
        "loop": {"steps": 1, "batch_size": micro_batch * draw(st.integers(1, 4)), "micro_batch": micro_batch},
        "validation": {"prompts": draw(st.lists(TEXT | st.just(""), max_size=3))},
        "trackers": draw(st.sampled_from([[], ["tensorboard"], ["wandb", "tensorboard"]])),
        "output": {"dir": draw(PATH), "name": draw(st.sampled_from(["no", "1e5", "007", "a-b.c", "_"]))},
    }
    return RunConfig.model_validate(tree)


BASE = """
model: {base: pocket}
data: {sources: [{path: photos}]}
loop: {steps: 1}
output: {dir: run}
"""
WORDS = [
    "Author",
    "Loop",
    "int",
    "str",
    "folder",
    "FolderSource",
    "<<",
    "Rank",
    "list[int]",
    "constrained-int",
    "",
    "A b",
]


@settings(max_examples=60, deadline=None)
@given(
    section=st.sampled_from(
        [(), ("loop",), ("data",), ("data", "sources", 0), ("adapter", "tokens", 0), ("validation",)]
    ),
    # the three letters that PyYAML writes as ends of lines are left out
    key=st.sampled_from(WORDS)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0\x85\u2028\u2029"), max_size=5),
    value=st.sampled_from([1, "x", [], {}, [1], {"a": 1}, None]),
)
def test_an_unknown_key_is_named_whatever_it_is_called(tmp_path_factory, section, key, value):
    values = yaml.safe_load(BASE) | {"adapter": {"tokens": [{"token": "<a>"}]}, "validation": {}}
    inner = values
    for step in section:
        inner = inner[step]
    if key in inner or (*section, key) in known_keys() or key == "extends":
        return
    inner[key] = value
    file = tmp_path_factory.getbasetemp() / "unknown.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(file)
    said = [problem for problem in caught.value.problems if "unknown key" in problem]
    assert len(said) == 1 and f"{dotted((*section, key))}: unknown key" in said[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=1000000", "adapter.rank"),
        (f"adapter.rank={10**18}", "adapter.rank"),
        (f"adapter.rank={'9' * 5000}", "is not what its tag"),
        ("data.variants=1000000000", "data.variants"),
        ("data.sources=[{prior: a, count: 1000000000}]", "data.sources.0.count"),
        ("loop.threads=1000000", "loop.threads"),
        ("loop.seed=18446744073709551616", "is too large"),
        (f"validation.seed={2**62}", "validation.seed"),
        ("validation.steps=1000000000", "validation.steps"),
        ("loop.steps=1e999", "loop.steps"),
        ('data.sources.0.caption="\\ud800"', "half of a character"),
        ('data.sources.0.caption="a\\0"', "NUL"),
        ('output.dir="a\\0b"', "NUL"),
        ("optimizer.name=..", "optimizer.name"),
        ("model=" + "[" * 5000, "not a YAML value"),
        ("a" * 5000 + "=1", "unknown key"),
    ],
    ids=lambda text: text[:30],
)
def test_what_no_run_can_have_is_refused(tmp_path, override, said):
    (tmp_path / "a.yaml").write_text(BASE)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "a.yaml", [override])
    assert any(said in problem for problem in caught.value.problems)
    assert max(map(len, caught.value.problems)) < 6000


def test_a_file_that_is_no_config_is_not_told(tmp_path):
    (tmp_path / "secret").write_text("root:x:0:0\nmore:x:1\n")
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path}/secret\n{BASE}")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "a.yaml")
    assert "root:" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(config=configs(), dump=st.sampled_from([dump_yaml, marked_yaml]))
def test_dumped_configs_load_back_equal(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig, dump: Callable[[RunConfig], str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8", newline="")
    assert load_config(file) == config


def test_dump_is_readable_and_in_the_order_of_the_schema(folder: Path) -> None:
    lines = dump_yaml(load(GOOD, "optimizer.learning_rate=1e-5")).splitlines()
    assert lines[:3] == ["model:", "  base: pocket", "  family: null"]
    assert "  parts: null" in lines
    assert "  learning_rate: 1.0e-05" in lines  # with the dot that YAML 1.1 readers need
    assert "  precision: 'no'" in lines
    assert [line[:-1] for line in lines if line.endswith(":") and line[0] != " "] == [
        name for name in RunConfig.model_fields if name not in ("callbacks", "trackers")
    ]


def test_defaults_are_marked(folder: Path) -> None:
    lines = marked_yaml(load(GOOD, "adapter.rank=8")).splitlines()
    assert "  rank: 8" in lines
    assert "  alpha: 8.0  # default" in lines
    assert "    - path: photos" in "\n".join(lines)
    assert "      loss_weight: 1.0  # default" in lines
    assert "  steps: 10" in lines
    assert "trackers: [tensorboard]  # default" in lines


def cpu_seconds(*arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Processor time of a command, which a busy machine changes less than the time on the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def test_a_typo_is_answered_in_a_third_of_a_second(folder: Path) -> None:
    Path("my.yaml").write_text("extends: good\noptimizer:\n  learnig_rate: 1\n")
    best = limit = 0.3
    for attempt in range(5):
        seconds, done = cpu_seconds("-m", "loraloom.launch.cli", "train", "my.yaml")
        best = seconds if attempt == 0 else min(best, seconds)
        if best < limit:
            break
        # cores shared with other work are slower: pydantic's own import takes 0.1 s on a quiet one
        limit = max(limit, 3 * cpu_seconds("-c", "import yaml; from pydantic import BaseModel")[0])
    assert done.returncode == 2
    assert done.stderr == 'error: my.yaml:3: optimizer.learnig_rate: unknown key (did you mean "learning_rate"?)\n'
    assert best < limit


def test_loading_imports_no_torch(folder: Path) -> None:
    code = "import sys; from loraloom.configs.loader import load_config; load_config('good.yaml'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "loraloom.adapters.methods.lora" in modules
    assert not {"torch", "peft", "diffusers", "transformers"} & set(modules)


@pytest.mark.parametrize(
    ("values", "alpha", "pattern"),
    [
        ("", 8.0, {}),  # as ever: a config that names no alpha trains what it trained
        ("rank: 16", 8.0, {}),
        ("rank: 16, alpha: rank", 16.0, {}),
        ("alpha: rank", 8.0, {}),
        ("alpha: rank, rank_pattern: {mid: 4, up: 2}, alpha_pattern: {up: 1}", 8.0, {"up": 1.0, "mid": 4.0}),
    ],
)
def test_alpha_may_be_the_rank(tmp_path, values, alpha, pattern):
    """It is a number from there on, also in what a run writes down."""
    file = tmp_path / "a.yaml"
    file.write_text(f"extends: parent\nadapter: {{method: lora, {values}}}\n")
    (tmp_path / "parent.yaml").write_text(
        "model: {base: pocket}\ndata: {sources: [{path: x}]}\nloop: {steps: 1}\noutput: {dir: r}\n"
    )
    config = load_config(file)
    assert (config.adapter.alpha, config.adapter.alpha_pattern) == (alpha, pattern)
    for text in (dump_yaml(config), given_yaml(config)):
        (tmp_path / "written.yaml").write_text(text)
        assert load_config(tmp_path / "written.yaml") == config
    if "alpha: rank" in values:
        assert load_config(file, ["adapter.rank=3"]).adapter.alpha == 3


def test_another_word_for_alpha_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"adapter\.alpha: should be a number, found \"rnk\""):
        load_config("pocket/style", ["adapter.alpha=rnk"])
