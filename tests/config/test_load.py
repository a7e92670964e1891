"""A YAML file is saved command-line words, and every mistake in either has one message."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rto_megatron.config.load import dump_run, load_any, load_despite_mistakes, load_run, split_options
from rto_megatron.config.model import ModelConfig, RopeScaling
from rto_megatron.config.run import STAGES
from rto_megatron.errors import ConfigError

SFT = "run_dir: runs/sft\ndata:\n  train: train.jsonl\n"
"""The shortest config of the sft stage: 3 lines."""

REQUIRED = {
    "sft": ["--run_dir=r", "--data.train=t"],
    "dpo": ["--run_dir=r", "--data.train=t", "--start=s"],
    "reward": ["--run_dir=r", "--data.train=t", "--start=s"],
    "rto": ["--run_dir=r", "--data.train=t", "--policy=p", "--reference=s", "--dpo=d", "--reward_model=m"],
    "evaluate": ["--run_dir=r", "--prompts=t", "--checkpoints", "a", "b", "--reference=s", "--reward_model=m"],
    "convert": ["--source=s", "--out=o"],
}


def sft(tmp_path: Path, text: str = SFT, *words: str):
    """Load an sft config from YAML text and words; the file is RUN.yaml in tmp_path."""
    path = tmp_path / "RUN.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run("sft", path, words)


def test_defaults_then_file_then_command_line():
    config = load_run("sft", None, ["--run_dir=r", "--data.train=t", "--seed=1", "--seed=2"])
    assert (config.seed, config.optimizer.lr, config.run_dir) == (2, 1e-4, Path("r"))


def test_command_line_wins_over_the_file(tmp_path):
    config = sft(tmp_path, SFT + "seed: 3\noptimizer: {lr: 1e-3, beta1: 0.5}\n", "--optimizer.lr=2e-3")
    assert (config.seed, config.optimizer.lr, config.optimizer.beta1) == (3, 2e-3, 0.5)


@pytest.mark.parametrize("words", [["--train.batch_size=8"], ["--train.batch-size=8"], ["--train.batch_size", "8"]])
def test_words_may_use_hyphens_and_spaces(tmp_path, words):
    assert sft(tmp_path, SFT, *words).train.batch_size == 8


def test_a_number_that_yaml_1_1_reads_as_text_is_a_number(tmp_path):
    assert sft(tmp_path, SFT + "optimizer: {eps: 1e-6}\n").optimizer.eps == 1e-6


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("yes", True), ("off", False)])
def test_switches_take_the_words_of_yaml(tmp_path, text, value):
    assert sft(tmp_path, SFT + f"model: {{qkv_bias: {text}}}\n").model.qkv_bias is value


def test_null_empties_an_optional_field(tmp_path):
    assert sft(tmp_path, SFT + "train: {max_steps: 5}\n", "--train.max_steps=null").train.max_steps is None


def test_a_section_may_be_left_empty(tmp_path):
    assert sft(tmp_path, SFT + "optimizer:\n").optimizer.lr == 1e-4


def test_a_list_is_read_from_file_and_command_line(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("checkpoints: [a, b]\n")
    rest = [word for word in REQUIRED["evaluate"] if word not in ("--checkpoints", "a", "b")]
    assert load_run("evaluate", path, rest).checkpoints == (Path("a"), Path("b"))
    assert load_run("evaluate", path, [*rest, "--checkpoints", "c", "d"]).checkpoints == (Path("c"), Path("d"))
    assert load_run("evaluate", path, [*rest, "--checkpoints=c"]).checkpoints == (Path("c"),)


def test_an_optional_section_appears_with_any_of_its_fields(tmp_path):
    assert sft(tmp_path).model.rope_scaling is None
    assert sft(tmp_path, SFT, "--model.rope_scaling.factor=2").model.rope_scaling == RopeScaling(factor=2.0)
    text = SFT + "model:\n  rope_scaling: {kind: linear, factor: 4}\n"
    assert sft(tmp_path, text).model.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert sft(tmp_path, SFT + "model: {rope_scaling: {}}\n").model.rope_scaling == RopeScaling()


def test_null_takes_an_optional_section_back(tmp_path):
    text = SFT + "model: {rope_scaling: {factor: 4}}\n"
    assert sft(tmp_path, text, "--model.rope_scaling=null").model.rope_scaling is None


def test_aliases_stand_for_what_they_name(tmp_path):
    path = tmp_path / "rto.yaml"
    path.write_text("seed: &n 3\nnum_steps: *n\noptimizer: &o {lr: 2e-3, beta1: 0.5}\ncritic_optimizer: *o\n")
    config = load_run("rto", path, REQUIRED["rto"])
    assert (config.seed, config.num_steps) == (3, 3)
    assert config.optimizer == config.critic_optimizer
    assert (config.critic_optimizer.lr, config.critic_optimizer.beta1) == (2e-3, 0.5)


def test_home_is_expanded_and_other_paths_stay_relative(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = sft(tmp_path, SFT + "start: ~/runs/base\n")
    assert (config.start, config.run_dir) == (Path("/home/someone/runs/base"), Path("runs/sft"))


@pytest.mark.parametrize("stage", REQUIRED)
def test_a_dumped_config_loads_as_itself(stage, tmp_path):
    config = load_run(stage, None, REQUIRED[stage])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_run(config), encoding="utf-8")
    assert load_run(stage, path, []) == config


def test_a_dumped_optional_section_loads_as_itself(tmp_path):
    config = replace(sft(tmp_path), model=ModelConfig(rope_scaling=RopeScaling(factor=3.0), head_dim=32))
    assert sft(tmp_path, dump_run(config)) == config


def test_ppo_takes_the_config_of_rto():
    assert STAGES["ppo"] is STAGES["rto"]


def test_a_file_names_its_stage_and_rto_and_ppo_take_each_other_s(tmp_path):
    assert sft(tmp_path, "stage: sft\n" + SFT) == sft(tmp_path)
    path = tmp_path / "rto.yaml"
    path.write_text("stage: rto\n")
    assert load_run("ppo", path, REQUIRED["rto"]).rto.dpo_coef == 0
    assert load_run("rto", path, REQUIRED["rto"]).rto.dpo_coef == 0.05
    assert load_run("rto", path, [*REQUIRED["rto"], "--stage=ppo"]).rto.dpo_coef == 0.05


def test_the_file_of_another_stage_is_refused_with_its_line(tmp_path):
    message = (
        r"RUN\.yaml:1: stage is dpo, but the command line runs sft; name a config of the stage sft, or run .* dpo`"
    )
    with pytest.raises(ConfigError, match=message):
        sft(tmp_path, "stage: dpo\n" + SFT)


@pytest.mark.parametrize("value", ["train", "[sft, dpo]", ""])
def test_a_stage_that_there_is_not_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"RUN\.yaml:4: the stage must be one of sft, dpo, .*, got"):
        sft(tmp_path, SFT + f"stage: {value}\n")


@pytest.mark.parametrize("stage", [*REQUIRED, "ppo"])
def test_a_dumped_config_says_which_stage_it_is_for(stage, tmp_path):
    config = load_run(stage, None, REQUIRED["rto" if stage == "ppo" else stage])
    path = tmp_path / "run.yaml"
    path.write_text(dump_run(config))
    assert path.read_text().startswith(f"stage: {stage}\n")
    assert load_any(path, []) == (stage, config)


@pytest.mark.parametrize("stage", ["rto", "evaluate", "convert"])
def test_settings_that_only_one_stage_has_tell_the_stage(stage):
    assert load_any(None, REQUIRED[stage]) == (stage, load_run(stage, None, REQUIRED[stage]))


def test_settings_of_several_stages_need_the_name_of_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SFT + "start: runs/base\n")
    with pytest.raises(
        ConfigError, match=r"run\.yaml: the settings may be those of sft or dpo or reward; .*stage: NAME"
    ):
        load_any(path, [])
    assert load_any(path, ["--stage=reward"])[0] == "reward"
    assert load_any(path, ["--dpo.beta=0.2"])[0] == "dpo"


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml")),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_every_example_loads_as_the_stage_that_it_is_named_after(path):
    assert load_any(path, [])[0] == path.stem


def test_a_wrong_name_is_told_once_the_stage_is_known(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SFT + "optimiser: {lr: 1}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: the settings are those of no stage; say which one is meant"):
        load_any(path, [])
    with pytest.raises(ConfigError, match=r"run\.yaml:4: optimiser\.lr is not a setting"):
        load_any(path, ["--stage=sft"])


BAD_FILES = {
    "not YAML": ("a: [1\n", r"RUN\.yaml:2: the config must be valid YAML, found: expected ',' or '\]'"),
    "a list": ("- a\n", r"RUN\.yaml: the config must be a mapping of keys to values, found a sequence"),
    "a duplicate": (SFT + "run_dir: x\n", r"RUN\.yaml:4: run_dir is set twice, first in line 1; delete one of the two"),
    "an unknown key": (
        SFT + "optimiser: {lr: 1}\n",
        r"RUN\.yaml:4: optimiser\.lr is not a setting; did you mean optimizer\.lr\?",
    ),
    "an unknown name in a section": (
        SFT + "train:\n  width: 1\n",
        r"RUN\.yaml:5: train\.width is not a setting; train takes batch_size, num_epochs, max_steps, eval_every",
    ),
    "a key of another section": (SFT + "lr: 1\n", r"RUN\.yaml:4: lr is not a setting; did you mean optimizer\.lr\?"),
    "text for a number": (SFT + "optimizer: {lr: fast}\n", r"RUN\.yaml:4: optimizer\.lr must be a number, got 'fast'"),
    "not a number": (SFT + "optimizer: {lr: nan}\n", r"RUN\.yaml:4: optimizer\.lr must be finite, got nan"),
    "a fraction": (SFT + "seed: 1.5\n", r"RUN\.yaml:4: seed must be a whole number, got 1\.5"),
    "text for an optional number": (
        SFT + "train: {max_steps: all}\n",
        r"RUN\.yaml:4: train\.max_steps must be a whole number or null, got 'all'",
    ),
    "text for a switch": (
        SFT + "model: {qkv_bias: 2}\n",
        r"RUN\.yaml:4: model\.qkv_bias must be true or false, got 2",
    ),
    "an unknown choice": (
        SFT + "compute: {dtype: fp16}\n",
        r"RUN\.yaml:4: compute\.dtype must be one of float32, bfloat16, got 'fp16'",
    ),
    "null for a required value": (SFT + "seed:\n", r"RUN\.yaml:4: seed must be a whole number, got null"),
    "a list for one value": (
        SFT + "seed: [1, 2]\n",
        r"RUN\.yaml:4: seed must be a whole number, got the list \['1', '2'\]",
    ),
    "a value for a section": (
        SFT + "train: 5\n",
        r"RUN\.yaml:4: train is a section, got 5; set its fields: batch_size, num_epochs, max_steps, eval_every",
    ),
    "a list of lists": (SFT + "seed: [[1]]\n", r"RUN\.yaml:4: seed must be a list of plain values"),
    "a mapping in itself": (
        SFT + "optimizer: &o\n  lr: 1\n  eps: *o\n",
        r"RUN\.yaml:6: optimizer\.eps must not be an alias of a section it is in; write its settings out",
    ),
    "a mapping in its own section": (
        SFT + "model: &m {rope_scaling: {factor: *m}}\n",
        r"RUN\.yaml:4: model\.rope_scaling\.factor must not be an alias of a section it is in",
    ),
    "a list in itself": (SFT + "seed: &s [*s]\n", r"RUN\.yaml:4: seed must be a list of plain values"),
    "a merged mapping": (
        SFT + "optimizer: &o {lr: 1e-3}\ntrain:\n  <<: *o\n",
        r"RUN\.yaml:6: train\.<< must not merge another mapping into this one; write its settings out",
    ),
    "hundreds of brackets": ("a: " + "[" * 5000, r"RUN\.yaml: the config must be sections of settings, found hundreds"),
    "a key that is a list": ("? [a]\n: 1\n", r"RUN\.yaml:1: a key must be a name, found a sequence"),
    "a missing key": (
        "run_dir: r\n",
        r"RUN\.yaml: data\.train must be set; write it in the file or add --data\.train=",
    ),
    "a value out of range": (
        SFT + "seed: 0\noptimizer:\n  lr: -1\n",
        r"RUN\.yaml:6: optimizer\.lr must be positive, got -1\.0",
    ),
    "a head without width": (
        SFT + "model: {head_dim: 0}\n",
        r"RUN\.yaml:4: model\.head_dim must be even .* and 2 or more, got 0",
    ),
    "fields that do not fit": (
        SFT + "model:\n  num_query_groups: 3\n",
        r"RUN\.yaml:5: model\.num_query_groups must divide num_attention_heads 4, got 3",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_message_with_its_line(case, tmp_path):
    text, message = BAD_FILES[case]
    with pytest.raises(ConfigError, match=message) as caught:
        sft(tmp_path, text)
    assert "\n" not in str(caught.value)


BAD_WORDS = {
    "a word without dashes": (
        ["seed=1"],
        r"command line: a setting must look like --section\.field=value, got 'seed=1'",
    ),
    "no value": (["--seed"], r"command line: --seed needs a value; write --seed=value"),
    "unknown": (["--sead=1"], r"command line: sead is not a setting; did you mean seed\?"),
    "negative": (["--train.batch_size", "-1"], r"command line: train\.batch_size must be 1 or more, got -1"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_a_bad_word_is_one_message(case, tmp_path):
    words, message = BAD_WORDS[case]
    with pytest.raises(ConfigError, match=message):
        sft(tmp_path, SFT, *words)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: there is no such config file"):
        load_run("sft", tmp_path / "absent.yaml", [])


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: the config file must be readable UTF-8 text"):
        load_run("sft", path, [])


def test_an_unknown_stage_is_named():
    with pytest.raises(ConfigError, match=r"the stage must be one of sft, dpo, .*, got 'train'"):
        load_run("train", None, [])


def test_a_shared_section_class_reports_under_the_name_of_its_section():
    words = [*REQUIRED["rto"], "--critic_optimizer.lr=-1"]
    with pytest.raises(ConfigError, match=r"command line: critic_optimizer\.lr must be positive, got -1\.0"):
        load_run("rto", None, words)


def test_a_rule_over_several_fields_points_at_the_first(tmp_path):
    path = tmp_path / "rto.yaml"
    path.write_text("samples_per_optimizer_step: 5\n")
    message = r"rto\.yaml:1: samples_per_optimizer_step must divide the 32 samples of a step"
    with pytest.raises(ConfigError, match=message):
        load_run("rto", path, REQUIRED["rto"])


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            "seed: 1",
            ["--schedule.map=split"],
            r"^command line: schedule\.rollout_ranks must be 1 or more with schedule\.map split, got 0; set it to",
        ),
        (
            "lora: {rank: 8}",
            ["--schedule.map=split", "--schedule.rollout_ranks=1"],
            r"rto\.yaml:1, schedule\.map from command line: lora must be null with schedule\.map split, got rank 8",
        ),
        (
            "schedule:\n  map: split\n  rollout_ranks: 1",
            ["--schedule.critic.tensor=2"],
            r"^command line: schedule\.critic needs .* got tensor 2 x pipeline 1 and 0 ranks; set",
        ),
        (
            "schedule: {map: colocated}",
            ["--schedule.rollout.tensor=2"],
            r"^command line, schedule\.map from .*rto\.yaml:1: schedule\.rollout needs .* got tensor 2",
        ),
    ],
)
def test_a_rule_over_several_fields_names_where_each_was_said(text, words, message, tmp_path):
    path = tmp_path / "rto.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_run("rto", path, [*REQUIRED["rto"], *words])


def test_a_rule_about_a_field_that_nobody_set_points_at_the_file(tmp_path):
    path = tmp_path / "rto.yaml"
    path.write_text("seed: 1\n")
    words = [word for word in REQUIRED["rto"] if not word.startswith("--dpo")]
    with pytest.raises(ConfigError, match=r"rto\.yaml: dpo must name the DPO run, got null; or set rto\.dpo_coef to 0"):
        load_run("rto", path, words)


@pytest.mark.parametrize(
    ("stage", "name"), [("sft", "start"), ("dpo", "start"), ("reward", "start"), ("rto", "critic")]
)
def test_a_run_that_would_be_written_over_what_it_reads_is_an_error(stage, name):
    with pytest.raises(
        ConfigError, match=f"command line: run_dir must not be the run that {name} names, got r for both"
    ):
        load_run(stage, None, [*REQUIRED[stage], f"--{name}={Path.cwd()}/r"])


def test_a_run_that_is_compared_with_itself_is_an_error():
    with pytest.raises(ConfigError, match=r"line: checkpoints must name each run once, got a, a/b, a$"):
        load_run("evaluate", None, [*REQUIRED["evaluate"], "--checkpoints", "a", "a/b", "a/"])


def test_help_lists_every_field_and_exits_with_0(capsys):
    with pytest.raises(SystemExit, match="0"):
        load_run("sft", None, ["--help"])
    shown = capsys.readouterr().out
    assert "--model.rope_scaling.factor" in shown and "Peak learning rate." in shown


def test_config_needs_no_torch():
    code = "import sys, rto_megatron.config.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_all_mistakes_are_told_and_the_rest_is_loaded(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("stage: sft\n" + SFT + "optimizer: {lr: -1, beta1: 0.5}\ntrain: {max_steps: all, width: 1}\n")
    stage, config, mistakes = load_despite_mistakes(path, ["--seed=x"])
    assert (stage, config.optimizer.lr, config.optimizer.beta1, config.train.max_steps) == ("sft", 1e-4, 0.5, None)
    said = sorted(str(mistake).removeprefix(f"{tmp_path}/").partition(" must")[0] for mistake in mistakes)
    assert [line.partition(" is not")[0] for line in said] == [
        "command line: seed",
        "sft.yaml:5: optimizer.lr",
        "sft.yaml:6: train.max_steps",
        "sft.yaml:6: train.width",
    ]


def test_a_mistake_that_follows_from_another_is_not_told():
    words = [*REQUIRED["rto"], "--prompts_per_step=10", "--samples_per_optimizer_step=3"]
    stage, config, mistakes = load_despite_mistakes(None, words)  # the default, 16, does not divide 10 either
    assert (stage, config) == ("rto", None)
    assert [str(mistake).partition(" must")[0] for mistake in mistakes] == ["command line: samples_per_optimizer_step"]


def test_without_a_required_setting_there_is_nothing_to_go_on_with():
    stage, config, [mistake] = load_despite_mistakes(None, ["--stage=sft", "--run_dir=r"])
    assert (stage, config) == ("sft", None)
    assert str(mistake).startswith("command line: data.train must be set")


@dataclass(frozen=True)
class Options:
    ranks: int | None = None
    as_text: bool = False


def test_a_command_takes_its_own_options_out_of_the_words():
    options, rest = split_options(Options, ["--ranks", "8", "--seed=1", "--as-text=yes", "--checkpoints", "a", "b"])
    assert options == Options(ranks=8, as_text=True)
    assert rest == ["--seed=1", "--checkpoints", "a", "b"]
    with pytest.raises(ConfigError, match=r"command line: ranks must be a whole number or null, got 'two'"):
        split_options(Options, ["--ranks=two"])
