"""Wrong configs, data files and checkpoints, and what the doctor must say of each."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rto_megatron.doctor.command import Options
from tests.stages.chain import MODEL, words_of


@dataclass(frozen=True)
class Case:
    """A run of the chain with something wrong."""

    stage: str
    words: str
    """Added to those of the chain; {tmp} is a folder of the case's own, {chain} that of the chain."""
    level: str
    says: str
    """Regular expression for what is found."""
    prepare: Callable[[Path, Path], None] = lambda tmp, chain: None
    """(tmp, chain): writes what is wrong into tmp."""
    options: Options = field(default_factory=Options)
    by: str = "stage"
    """Who refuses it too: the stage, the `config` before it, or `nobody` (no error, or on other ranks)."""

    def all_words(self, tmp: Path, chain: Path) -> list[str]:
        """The command line's, after the stage."""
        chain_s = [] if self.stage == "convert" else words_of(self.stage, chain)
        place = [] if self.stage in ("generate", "convert") else [f"--run_dir={tmp}/new"]
        return [*chain_s, *place, *self.words.format(tmp=tmp, chain=chain).split()]


def write(name: str, *rows: object) -> Callable[[Path, Path], None]:
    """A file of these lines: text as it is, everything else as JSON."""

    def prepare(tmp: Path, chain: Path) -> None:
        lines = [row if isinstance(row, bytes) else (json.dumps(row) + "\n").encode() for row in rows]
        (tmp / name).write_bytes(b"".join(lines))

    return prepare


def copy(run: str, change: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """A copy of a run of the chain, whose checkpoint folder is changed."""

    def prepare(tmp: Path, chain: Path) -> None:
        shutil.copytree(chain / run, tmp / run)
        root = tmp / run / "checkpoints"
        change(root / (root / "latest.txt").read_text().strip())

    return prepare


def manifest(**values: object) -> Callable[[Path], None]:
    """Another manifest, with the hash that fits: what another run would have written."""

    def change(folder: Path) -> None:
        raw = json.loads((folder / "checkpoint.json").read_text())
        for name, value in values.items():
            if name in (*MODEL, "vocab_size"):
                for model in raw["models"].values():
                    model[name] = value
            else:
                raw[name] = value
        (folder / "checkpoint.json").write_text(json.dumps(raw))
        rehash(folder, "checkpoint.json")

    return change


def rehash(folder: Path, name: str) -> None:
    """Have the checkpoint believe what a file holds now."""
    from rto_megatron.distributed.checkpoint import digest_of, file_hash

    integrity = json.loads((folder / "integrity.json").read_text())
    integrity["files"][name] = file_hash(folder / name)
    integrity["digest"] = digest_of(integrity["files"])
    (folder / "integrity.json").write_text(json.dumps(integrity))


def another_template(folder: Path) -> None:
    """The same tokenizer with another chat template."""
    from rto_megatron.data.tokenizer import load_tokenizer

    template = folder / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    rehash(folder, "tokenizer/chat_template.jinja")
    manifest(tokenizer=load_tokenizer(folder / "tokenizer").digest())(folder)


def another_tokenizer_in_the_folder(folder: Path) -> None:
    """A template that the manifest does not know."""
    template = folder / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    rehash(folder, "tokenizer/chat_template.jinja")


def flip_a_bit(folder: Path) -> None:
    shard = next(path for path in sorted(folder.glob("policy/*.distcp")))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def half_done(folder: Path) -> None:
    """As if the run had been stopped after its first step."""
    manifest(step=1)(folder)


def an_unfinished_save(folder: Path) -> None:
    half_done(folder)
    (folder.parent / "step_00000002.1.tmp").mkdir()


def rows_file(name: str, count: int, answer: str = "fine") -> Callable[[Path, Path], None]:
    return write(name, *({"prompt": f"What is this {i}?", "response": answer} for i in range(count)))


def pair(i: int, **changes: object) -> dict:
    return {"prompt": f"Who is it {i}?", "chosen": f"It is I {i}.", "rejected": "No."} | changes


GOOD = [pair(i) for i in range(8)]
LONG = "the cat sat " * 40

CONFIG = {
    "an unknown setting": Case("rto", "--rto.dpo_koef=1", "error", r"rto\.dpo_koef is not a setting", by="config"),
    "text for a number": Case("sft", "--optimizer.lr=fast", "error", r"optimizer\.lr must be a number", by="config"),
    "a number out of range": Case("rto", "--ppo.clip=-1", "error", r"ppo\.clip must be positive, got -1", by="config"),
    "minibatches that do not divide the step": Case(
        "rto", "--samples_per_optimizer_step=3", "error", "must divide the 8 samples of a step", by="config"
    ),
    "a DPO term without a DPO run": Case("rto", "--dpo=null", "error", "dpo must name the DPO run", by="config"),
    "a score without a reward run": Case(
        "rto", "--reward_model=null", "error", "reward_model must name the reward run", by="config"
    ),
    "greedy training": Case("rto", "--rollout.temperature=0", "error", "temperature must be positive", by="config"),
    "a cut distribution": Case("rto", "--rollout.top_k=5", "error", "must be 0 and 1 in training", by="config"),
    "a pipeline where TDPO compares distributions": Case(
        "dpo", "--dpo.loss=tdpo2 --parallel.pipeline=2", "error", "pipeline must be 1 with dpo.loss tdpo2", by="config"
    ),
    "a setting of another loss": Case("dpo", "--dpo.margin=1", "error", "margin must be 0 with dpo.loss", by="config"),
    "a setting of TDPO's second form with its first": Case(
        "dpo",
        "--dpo.loss=tdpo1 --dpo.drift_coef=0.7",
        "error",
        r"drift_coef must be 0\.5 with dpo\.loss tdpo1, .*, got 0\.7",
        by="config",
    ),
    "nothing to learn": Case("rto", "--rto.dpo_coef=0 --rto.score_coef=0", "error", "nothing to learn", by="config"),
    "a run over what it reads": Case(
        "dpo", "--run_dir={chain}/sft", "error", "run_dir must not be the run that start names", by="config"
    ),
    "sequence parallelism on one rank": Case(
        "sft", "--parallel.sequence=true", "error", r"needs parallel\.tensor > 1", by="config"
    ),
    "a model beside a start": Case(
        "sft", "--start={chain}/sft", "error", "model must not be set where `start` names a run", by="config"
    ),
    "heads that do not divide the width": Case(
        "sft",
        "--model.num_attention_heads=5 --model.num_query_groups=5",
        "error",
        "must divide hidden_size",
        by="config",
    ),
}

LAYOUT = {
    "ranks that do not fill the layout": Case(
        "rto", "--parallel.tensor=2", "error", "does not divide the 1 ranks", options=Options(ranks=1)
    ),
    "a seed that torch cannot take": Case("sft", "--seed=-1", "error", "seed must be 0 or more"),
    "heads that do not divide": Case(
        "rto", "--parallel.tensor=3", "error", r"tensor must divide model\.num_attention_heads 4, got 3", by="nobody"
    ),
    "layers that do not divide": Case(
        "dpo", "--parallel.pipeline=3", "error", r"pipeline must divide model\.num_layers 4, got 3", by="nobody"
    ),
    "a vocabulary that does not divide": Case(
        "sft",
        "--parallel.tensor=5 --model.num_attention_heads=5 --model.num_query_groups=5 --model.hidden_size=30 "
        "--model.ffn_hidden_size=60",
        "error",
        "tensor must divide the padded vocabulary",
        by="nobody",
    ),
    "a batch that replicas cannot share": Case(
        "sft", "", "error", "batch_size must be a multiple of the 3 .* got 8", options=Options(ranks=3), by="nobody"
    ),
    "samples that replicas cannot share": Case(
        "rto", "", "error", "samples_per_prompt must be a multiple of the 3", options=Options(ranks=3), by="nobody"
    ),
    "minibatches that replicas cannot share": Case(
        "rto", "", "error", "optimizer_step must be a multiple of the 8", options=Options(ranks=8), by="nobody"
    ),
    "a grader that is nowhere": Case(
        "rto", "--grader=no_such:judge", "error", "grader no_such:judge: cannot be imported"
    ),
    "rows that are packed and shared over context ranks": Case(
        "rto",
        "--parallel.context=2 --compute.packing=true",
        "error",
        "packing must be null or false with parallel.context > 1, got true",
        options=Options(ranks=2),
        by="nobody",
    ),
    "more threads than cores": Case("sft", "--compute.threads=4096", "warning", "more than the .* cores", by="nobody"),
    "a pipeline that waits": Case(
        "dpo", "--parallel.pipeline=4", "note", "4 stages: each waits 43% of a step", by="nobody"
    ),
    "a microbatch that is never full": Case(
        "dpo", "--compute.micro_batch_size=64", "note", "more than the 8 rows", by="nobody"
    ),
    "slots that are never used": Case(
        "rto", "--rollout.max_slots=64", "note", "max_slots 64 is more than the 8 samples", by="nobody"
    ),
    "a rank without room": Case(
        "rto", "", "error", "models alone take .* which has 1", options=Options(memory=1e-3), by="nobody"
    ),
    "a rank without room for the rest": Case(
        "rto", "", "warning", "a rank needs about .* and has 1", options=Options(memory=1e-2), by="nobody"
    ),
    "nothing but warm-up": Case(
        "dpo", "--optimizer.warmup_frac=1", "warning", "2 of 2 optimizer steps are warm-up", by="nobody"
    ),
}

CHECKPOINTS = {
    "a run that is not there": Case("rto", "--policy={tmp}/absent", "error", "absent: there is no such run folder"),
    "a run that has not finished": Case(
        "dpo", "--start={tmp}", "error", "holds no finished checkpoint", prepare=write("run.yaml", {})
    ),
    "a Hugging Face folder": Case(
        "dpo", "--start={tmp}", "error", "looks like a Hugging Face folder|holds no finished", write("config.json", {})
    ),
    "a flipped bit": Case("dpo", "--start={tmp}/sft", "error", "distcp: changed since", copy("sft", flip_a_bit)),
    "a missing file": Case(
        "dpo", "--start={tmp}/sft", "error", r"\.metadata: is missing", copy("sft", unlink("policy/.metadata"))
    ),
    "no hashes": Case("dpo", "--start={tmp}/sft", "error", "is not complete", copy("sft", unlink("integrity.json"))),
    "another version's": Case(
        "dpo", "--start={tmp}/sft", "error", "written by another version", copy("sft", manifest(format=1))
    ),
    "a tokenizer that was swapped": Case(
        "dpo",
        "--start={tmp}/sft",
        "error",
        "is not the tokenizer that the checkpoint was saved with",
        copy("sft", another_tokenizer_in_the_folder),
    ),
}

ROLES = {
    "DPO from another reference": Case(
        "rto", "--reference={tmp}/sft", "error", "was trained from the reference", copy("sft", manifest(step=7))
    ),
    "DPO from another reference, on purpose": Case(
        "rto",
        "--reference={tmp}/sft --allow_other_reference=true",
        "warning",
        "trained from another reference, and allow_other_reference lets it pass",
        copy("sft", manifest(step=7)),
        by="nobody",
    ),
    "DPO that is the reference": Case(
        "rto",
        "--dpo={chain}/sft --allow_other_reference=true",
        "warning",
        "the DPO policy and the reference are the same checkpoint",
        by="nobody",
    ),
    "another tokenizer": Case(
        "rto", "--policy={tmp}/sft", "error", "its tokenizer differs from", copy("sft", manifest(tokenizer="0" * 64))
    ),
    "another chat template": Case(
        "rto", "--policy={tmp}/sft", "error", "its chat template differs from", copy("sft", another_template)
    ),
    "a judge that is no reward model": Case(
        "rto", "--reward_model={chain}/dpo", "error", "must be a run of the stage reward, .* got one of dpo"
    ),
    "a policy from a reward run": Case(
        "generate", "--checkpoint={chain}/reward", "error", "a policy must start from a run of sft, dpo"
    ),
    "one of the compared policies is a reward run": Case(
        "evaluate", "--checkpoints {chain}/sft {chain}/reward", "error", "a policy must start from a run of sft, dpo"
    ),
    "a window beyond the model": Case(
        "rto", "--rollout.max_new_tokens=30", "error", "must be at most the 64 tokens that the reference .* got 70"
    ),
    "a window beyond one role": Case(
        "rto",
        "--critic={tmp}/sft",
        "error",
        r"at most the 48 tokens that the critic \(.*\) can see, got 52",
        copy("sft", manifest(max_length=48)),
    ),
    "rows beyond the model": Case(
        "dpo", "--data.max_length=65", "error", "max_length must be at most the model's 64 tokens"
    ),
    "rows beyond a model from scratch": Case(
        "sft", "--data.max_length=65", "error", "max_length must be at most the model's 64 tokens"
    ),
    "a vocabulary with other padding": Case(
        "rto",
        "--policy={tmp}/sft",
        "note",
        "their vocabularies differ: .* policy 380",
        copy("sft", manifest(vocab_size=380)),
        by="nobody",
    ),
    "a flat reward model": Case(
        "rto",
        "--reward_model={tmp}/reward",
        "warning",
        "nearly flat: its raw scores have a standard deviation of 0.01",
        copy("reward", manifest(score_std=0.01)),
        by="nobody",
    ),
    "a converted reward model that was never normalised": Case(
        "rto",
        "--reward_model={tmp}/reward",
        "warning",
        "converted without score_data: its scores are not normalised",
        copy("reward", manifest(stage="convert", score_mean=0.0, score_std=1.0)),
        by="nobody",
    ),
    "another temperature than DPO's": Case(
        "rto", "--rollout.temperature=0.7", "note", "temperature is 0.7, and DPO was trained at 1", by="nobody"
    ),
    "no tokenizer": Case(
        "sft", "--tokenizer.path=null", "error", "tokenizer.path must be set for a model from scratch"
    ),
    "a tokenizer that is not there": Case(
        "sft", "--tokenizer.path={tmp}/t", "error", "there is no such file or folder"
    ),
    "a tokenizer that is none": Case(
        "sft", "--tokenizer.path={tmp}/t.model", "error", "must be a sentencepiece model", write("t.model", 0)
    ),
    "a vocabulary that is too small": Case(
        "sft", "--model.vocab_size=10", "error", "the tokenizer does not fit the weights"
    ),
}

DATA = {
    "a file that is not there": Case("sft", "--data.train={tmp}/x.jsonl", "error", "there is no such data file"),
    "held-out rows that are not there": Case("rto", "--data.eval={tmp}/x.jsonl", "error", "there is no such data file"),
    "an empty file": Case(
        "sft", "--data.train={tmp}/x.jsonl", "error", "needs at least one row, found none", write("x.jsonl")
    ),
    "half a line": Case(
        "dpo", "--data.train={tmp}/x.jsonl", "error", r"x\.jsonl:9: must be one JSON", write("x.jsonl", *GOOD, b'{"a')
    ),
    "bytes that are no text": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl",
        "error",
        r":9: must be UTF-8",
        write("x.jsonl", *GOOD, b'{"prompt": "\xff"}'),
    ),
    "no prompt": Case(
        "rto",
        "--data.train={tmp}/x.jsonl",
        "error",
        ":9: needs a non-empty 'prompt'",
        write("x.jsonl", *GOOD, {"a": 1}),
    ),
    "no response": Case(
        "sft",
        "--data.train={tmp}/x.jsonl",
        "error",
        ":1: needs a non-empty 'response'",
        write("x.jsonl", {"prompt": "a"}),
    ),
    "an answer that is no text": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl",
        "error",
        "needs text in 'chosen', got 3",
        write("x.jsonl", pair(0, chosen=3)),
    ),
    "sides that are the same": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl",
        "error",
        ":9: needs a pair whose sides differ",
        write("x.jsonl", *GOOD, pair(9, rejected="It is I 9.")),
    ),
    "a role that there is not": Case(
        "rto",
        "--data.train={tmp}/x.jsonl",
        "error",
        "needs a role out of system, user, assistant, got 'bot'",
        write("x.jsonl", {"messages": [{"role": "bot", "content": "hi"}]}),
    ),
    "a conversation without a question": Case(
        "rto",
        "--data.train={tmp}/x.jsonl",
        "error",
        "needs a user turn before the answer",
        write("x.jsonl", {"messages": [{"role": "system", "content": "Be kind."}]}),
    ),
    "rows that are all too long": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl",
        "error",
        "none of its 2 rows has at most 64 tokens",
        write("x.jsonl", pair(0, chosen=LONG), pair(1, chosen=LONG)),
    ),
    "a row that is too long where none may be": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl --data.too_long=error",
        "error",
        r":9: needs at most 64 tokens \(data.max_length\)",
        write("x.jsonl", *GOOD, pair(9, chosen=LONG)),
    ),
    "a few rows that are dropped": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl",
        "note",
        "8 of 9 rows; 1 dropped, over 64 tokens; tokens: .* half below",
        write("x.jsonl", *GOOD, pair(9, chosen=LONG)),
        by="nobody",
    ),
    "many rows that are dropped": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl",
        "warning",
        "8 of 16 rows; 8 dropped, over 64 tokens, 50% of them",
        write("x.jsonl", *GOOD, *(pair(i, chosen=LONG) for i in range(8))),
        by="nobody",
    ),
    "fewer rows than a batch": Case(
        "sft", "--data.train={tmp}/x.jsonl", "error", "7 rows are left, fewer than train.batch", rows_file("x.jsonl", 7)
    ),
    "fewer prompts than a step": Case(
        "rto",
        "--data.train={tmp}/x.jsonl",
        "error",
        "7 prompts are left, fewer than prompts_per",
        rows_file("x.jsonl", 7),
    ),
    "held-out rows that are trained on": Case(
        "sft", "", "warning", "16 of the 16 held-out rows have a prompt that data.train has too", by="nobody"
    ),
    "the same rows twice": Case(
        "dpo",
        "--data.train={tmp}/x.jsonl",
        "note",
        "8 copies of other rows",
        write("x.jsonl", *GOOD, *GOOD),
        by="nobody",
    ),
    "nothing held out": Case("rto", "--data.eval=null", "note", "nothing is held out", by="nobody"),
    "prompts that cannot be read": Case(
        "generate", "--prompts={tmp}/x.jsonl", "error", "must be one JSON object, found a list", write("x.jsonl", [1])
    ),
    "a template that cannot render": Case(
        "sft",
        "--tokenizer.chat_template={tmp}/t.jinja",
        "error",
        "cannot render",
        lambda tmp, chain: (tmp / "t.jinja").write_text("{{ messages[7].content.nothing }}"),
    ),
}

REWARDS = {
    "no bound on the DPO term": Case("rto", "--rto.dpo_clip=null", "warning", "the DPO term has no bound", by="nobody"),
    "a DPO term that cannot matter": Case(
        "rto", "--rto.dpo_clip=0.001", "warning", r"the DPO term is at most 0.012 .* 1\.2%", by="nobody"
    ),
    "a DPO term that drowns the score": Case(
        "rto", "--rto.dpo_clip=5", "warning", r"the DPO term may be 60 in a response of 12 tokens, 98\.4%", by="nobody"
    ),
    "a clip that cuts every token": Case(
        "rto", "--rto.dpo_coef=100", "warning", "cuts log-ratios beyond 0.002 nats", by="nobody"
    ),
    "nothing holds the policy": Case("rto", "--rto.kl_coef=0", "warning", "nothing holds the policy", by="nobody"),
    "what the KL penalty weighs": Case("rto", "", "note", "100 nats of KL in a response cost as much", by="nobody"),
    "no DPO term": Case("ppo", "", "note", "rto.dpo_coef is 0", by="nobody"),
    "no score": Case("rto", "--rto.score_coef=0", "note", "no reward model is asked", by="nobody"),
    "a score without bound": Case("rto", "--rto.score_clip=1000", "warning", "1e\\+03, 100% of the", by="nobody"),
    "shaping alone": Case("rto", "--rto.shaping=shaping_only", "note", "adds up to 0 over a response", by="nobody"),
}

FOLDER = {
    "a run folder below a file": Case(
        "sft", "--run_dir={tmp}/f/run", "error", "cannot be written", write("f", 0), by="nobody"
    ),
    "a run folder that is a file": Case(
        "sft", "--run_dir={tmp}/f", "error", "cannot be written", write("f", 0), by="nobody"
    ),
    "answers into a folder": Case("generate", "--out={tmp}", "error", "is a folder", by="nobody"),
    "answers over others": Case(
        "generate", "--out={tmp}/f", "note", "would be written over", write("f", 0), by="nobody"
    ),
    "the folder of another stage's run": Case(
        "dpo", "--run_dir={tmp}/reward", "error", "holds a run of the stage reward", copy("reward", lambda _: None)
    ),
    "the folder of a run with other settings": Case(
        "dpo",
        "--run_dir={tmp}/dpo --dpo.beta=0.3",
        "error",
        r"dpo\.beta is 0\.3, but the run in",
        copy("dpo", half_done),
    ),
    "the folder of a run on other data": Case(
        "dpo",
        "--run_dir={tmp}/dpo --data.train={tmp}/dpo/x.jsonl",
        "error",
        "the run began with another data as data.train",
        lambda tmp, chain: (copy("dpo", half_done)(tmp, chain), write("x.jsonl", *GOOD)(tmp / "dpo", chain)),
    ),
    "the folder of a run from another start": Case(
        "dpo",
        "--run_dir={tmp}/dpo --start={tmp}/sft",
        "error",
        "the run began with another checkpoint as reference",
        lambda tmp, chain: (copy("dpo", half_done)(tmp, chain), copy("sft", manifest(step=7))(tmp, chain)),
    ),
    "measurements that are none": Case(
        "sft",
        "--run_dir={tmp}",
        "error",
        r"metrics\.jsonl:1: must be a row of metrics",
        lambda tmp, chain: ((tmp / "tensorboard").mkdir(), write("tensorboard/metrics.jsonl", 3, 4)(tmp, chain)),
    ),
    "an evaluation below a file": Case(
        "evaluate", "--run_dir={tmp}/f/g", "error", "cannot be written", write("f", 0), by="nobody"
    ),
    "the folder of a longer run": Case(
        "dpo", "--run_dir={tmp}/dpo", "error", "has 9 steps, more than the 2", copy("dpo", manifest(step=9))
    ),
    "a run that goes on": Case(
        "dpo", "--run_dir={tmp}/dpo", "note", "would go on after step 1 of 2", copy("dpo", half_done), by="nobody"
    ),
    "a run that is done": Case("dpo", "--run_dir={chain}/dpo", "note", "all 2 steps are done", by="nobody"),
    "a save that was killed": Case(
        "dpo", "--run_dir={tmp}/dpo", "note", "1 unfinished saves", copy("dpo", an_unfinished_save), by="nobody"
    ),
    "the best of nothing": Case(
        "rto",
        "--checkpoint.keep_best=true --data.eval=null",
        "warning",
        "nothing is held out to be best on",
        by="nobody",
    ),
    "the best of steps that are not saved": Case(
        "rto",
        "--checkpoint.keep_best=true --checkpoint.save_every=1",
        "warning",
        "evaluates only at the end",
        by="nobody",
    ),
    "a conversion onto something": Case(
        "convert", "--source={chain}/sft --out={tmp}", "error", "out .* must not exist"
    ),
    "a conversion of a role that is not there": Case(
        "convert", "--source={chain}/reward --out={tmp}/o --role=critic", "error", "must hold the role critic .* value"
    ),
    "a conversion with a setting of the other direction": Case(
        "convert", "--source={chain}/sft --out={tmp}/o --score_data=x", "error", "score_data must be null where a run"
    ),
    "a conversion of half a model": Case(
        "convert",
        "--source={tmp} --out={tmp}/o",
        "error",
        "must name one of LlamaForCausalLM",
        write("config.json", {"architectures": ["GPT2LMHeadModel"]}),
    ),
    "a conversion of nothing": Case(
        "convert", "--source={tmp} --out={tmp}/o", "error", "must be a Hugging Face folder", write("x", 0)
    ),
}

CASES = CONFIG | LAYOUT | CHECKPOINTS | ROLES | DATA | REWARDS | FOLDER
