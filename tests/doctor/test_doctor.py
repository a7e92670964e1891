"""Everything that is wrong with a run is found before it starts, as the run itself would say it."""

import json
import re
import subprocess
import sys

import pytest

from rto_megatron.config.load import load_run
from rto_megatron.doctor.command import Options, examine
from rto_megatron.errors import ConfigError
from tests.doctor.cases import CASES, GOOD, Case, pair, write
from tests.ranks import run_ranks


def findings(case, tmp, chain):
    words = [f"--stage={case.stage}", *case.all_words(tmp, chain)]
    return examine(None, words, case.options)


@pytest.fixture(scope="module")
def folders(chain, tmp_path_factory):
    """A folder for each case with what is wrong in it."""
    made = {}
    for number, (name, case) in enumerate(CASES.items()):
        made[name] = tmp_path_factory.mktemp(f"case{number}")
        case.prepare(made[name], chain)
    return made


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_found(name, chain, folders):
    case = CASES[name]
    report = findings(case, folders[name], chain)
    found = [finding for finding in report.findings if re.search(case.says, finding.what)]
    assert [finding.level for finding in found][:1] == [case.level], [
        f.what for f in report.findings if f.level != "ok"
    ]
    assert found[0].why
    assert found[0].way_out or case.level == "note"
    assert report.exit_code == (2 if case.level == "error" else 0)


def run_stages(jobs):
    """Run stages one after the other; what each is refused with."""
    import importlib

    from rto_megatron.config.load import load_run
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.errors import UserError

    said = {}
    for name, (stage, words) in jobs.items():
        try:
            config = load_run(stage, None, words)
            importlib.import_module(f"rto_megatron.stages.{stage}").run(config, start_runtime(threads=1))
            said[name] = "nothing"
        except UserError as error:
            said[name] = str(error)
    return said


@pytest.fixture(scope="module")
def refusals(chain, folders):
    """What the stages themselves say of the cases that they refuse."""
    jobs = {n: (case.stage, case.all_words(folders[n], chain)) for n, case in CASES.items() if case.by == "stage"}
    return run_ranks(run_stages, 1, jobs)[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by == "stage"])
def test_the_stage_refuses_it_in_the_same_words(name, chain, folders, refusals):
    errors = [f for f in findings(CASES[name], folders[name], chain).findings if f.level == "error"]
    assert refusals[name] in {text for f in errors for text in (f.what, f"{f.what}; {f.way_out}")}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by == "config"])
def test_the_config_is_refused_in_the_same_words(name, chain, folders):
    case = CASES[name]
    with pytest.raises(ConfigError) as error:
        load_run(case.stage, None, case.all_words(folders[name], chain))
    errors = [f for f in findings(case, folders[name], chain).findings if f.level == "error"]
    assert str(error.value) in {text for f in errors for text in (f.what, f"{f.what}; {f.way_out}")}


def refused_on_three_ranks(words):
    from rto_megatron.distributed.collectives import barrier

    said = run_stages({"it": ("rto", words)})["it"]
    barrier()  # a rank that ends early takes its connections from those that still build groups
    return said


@pytest.mark.parametrize("name", ["heads that do not divide", "samples that replicas cannot share"])
def test_three_ranks_refuse_what_the_doctor_told_one(name, chain, tmp_path):
    case = CASES[name]
    words = case.all_words(tmp_path, chain)
    said = run_ranks(refused_on_three_ranks, 3, words)
    report = examine(None, ["--stage=rto", *words], Options(ranks=3))
    assert [said[0]] * 3 == said
    assert said[0] in {text for f in report.findings for text in (f.what, f"{f.what}; {f.way_out}")}


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "rto", "ppo", "generate", "evaluate"])
def test_a_run_that_works_has_no_errors(stage, chain, tmp_path):
    place = "--out" if stage == "generate" else "--run_dir"
    report = findings(Case(stage, f"{place}={tmp_path}/new", "ok", ""), tmp_path, chain)
    assert [finding.what for finding in report.findings if finding.level == "error"] == []
    assert report.exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_several_mistakes_are_all_found(chain, tmp_path):
    write("x.jsonl", *GOOD, b"{\n", pair(9, chosen=""), *({"a": i} for i in range(6)))(tmp_path, chain)
    words = "--optimizer.lr=-1 --rto.koef=2 --dpo={tmp}/absent --reward_model={chain}/sft --rto.kl_coef=0 "
    case = Case("rto", words + "--data.train={tmp}/x.jsonl --rollout.max_new_tokens=60", "error", "")
    report = findings(case, tmp_path, chain)
    errors = "\n".join(finding.what for finding in report.findings if finding.level == "error")
    for each in (
        "optimizer.lr must be positive",
        "rto.koef is not a setting",
        "absent: there is no such run folder",
        "must be a run of the stage reward",
        "tokens that the policy",
        "x.jsonl:9: must be one JSON object",
        "x.jsonl:11: needs a non-empty 'prompt'",
        "2 more rows are bad",
    ):
        assert each in errors
    assert "rto.kl_coef is 0" in "\n".join(f.what for f in report.findings if f.level == "warning")


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "rto", "generate", "evaluate"])
def test_whatever_is_missing_the_rest_is_checked(stage, chain, tmp_path):
    paths = {
        "sft": ["--tokenizer.path=a", "--data.train=b.jsonl", "--data.eval=c.jsonl"],
        "dpo": ["--start=a", "--data.train=b.jsonl"],
        "reward": ["--start=a", "--data.eval=b.jsonl"],
        "rto": [f"--{role}=a" for role in ("policy", "reference", "dpo", "reward_model")] + ["--data.train=b.jsonl"],
        "generate": ["--checkpoint=a", "--prompts=b.jsonl"],
        "evaluate": ["--reference=a", "--dpo=b", "--reward_model=c", "--prompts=d.jsonl", "--checkpoints e"],
    }[stage]
    for wrong in [paths, *([one] for one in paths)]:
        report = findings(Case(stage, " ".join(wrong), "error", ""), tmp_path, chain)
        assert report.exit_code == 2
        assert [section.name for section in report.sections][-1] == "run folder"


def test_sizes_and_shares_are_those_of_the_run(chain, tmp_path):
    report = findings(Case("rto", f"--run_dir={tmp_path}/new", "ok", ""), tmp_path, chain)
    tables = {table.title: dict(row[:2] for row in table.rows) for s in report.sections for table in s.tables}
    assert tables["what follows from the batch sizes"]["optimizer steps per step"] == 2
    [rewards] = [t for s in report.sections for t in s.tables if t.title.startswith("reward units")]
    # 0.2 x 12 tokens; 0.01 x 0.1 nats x 12 tokens; 1 x 10
    assert [row[2] for row in rewards.rows] == ["2.4", "0.012", "10"]
    assert [row[3] for row in rewards.rows] == ["19.3%", "0.1%", "80.6%"]


def test_the_command_line_prints_writes_json_and_exits_with_2(chain, tmp_path):
    from rto_megatron.config.load import dump_run
    from tests.stages.chain import words_of

    path = tmp_path / "run.yaml"
    path.write_text(dump_run(load_run("rto", None, [*words_of("rto", chain), f"--run_dir={tmp_path}/new"])))

    def doctor(*words):
        command = [sys.executable, "-m", "rto_megatron", "doctor", str(path), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = doctor(f"--json={tmp_path}/report.json", "--ranks=2", "--parallel.tensor=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "this run would start: 0 errors" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exit_code"] == 0
    assert {"machine", "layout", "data", "rewards", "memory"} <= {section["name"] for section in report["sections"]}
    assert not (tmp_path / "new").exists()

    done = doctor("--optimizer.lr=-1")
    assert done.returncode == 2
    assert "error    command line: optimizer.lr must be positive, got -1.0" in done.stdout
    assert "this run would be refused or fail: 1 error," in done.stdout
