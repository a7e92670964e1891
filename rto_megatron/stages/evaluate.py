"""Policies side by side on held-out prompts: score, KL to the reference, what the return is made of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rto_megatron.algorithms.rewards import shape_token_rewards
from rto_megatron.config.run import EvaluateRun
from rto_megatron.data.readers import PromptRow, read_prompts
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import Runtime, is_main
from rto_megatron.errors import writing
from rto_megatron.metrics import Console, format_number
from rto_megatron.stages.actors import load_judges
from rto_megatron.stages.answer_files import alpaca_eval, arena_hard, labels_of
from rto_megatron.stages.grader import load_grader, win_rate
from rto_megatron.stages.held_out import Answers, answer
from rto_megatron.stages.roles import load_role, tokenizer_of
from rto_megatron.stages.rules import check_run
from rto_megatron.stages.run import check_writable, json_lines, write_text

COLUMNS = {
    "policy": "run",
    "score": "mean score of the reward model, normalised",
    "score_error": "standard error of that mean",
    "win_rate": "share of prompts on which it scores above the first policy; a tie counts half",
    "kl": "nats: log pi - log pi_ref of a whole response, mean",
    "length": "tokens of a response, mean",
    "truncated": "share of responses that filled the window",
    "dpo_share": "share of the DPO term in the return",
    "kl_share": "share of the KL term",
    "score_share": "share of the score term",
}
GRADES = {
    "grade": "mean grade by `grader`",
    "grade_win_rate": "share of prompts on which it has the higher grade than the first policy; a tie counts half",
}
"""More columns, where there is a grader."""


@dataclass(frozen=True)
class Row:
    """A policy and its responses."""

    name: str
    """The last part of its path, or the whole where two would be the same."""
    answers: Answers
    texts: list[str] = field(default_factory=list)
    """The responses."""
    grades: list[float] = field(default_factory=list)
    """By the user's grader; none without one, and on other ranks than the main one."""


def run(config: EvaluateRun, runtime: Runtime) -> None:
    """Answer the held-out prompts with each policy, judge, print and write the table."""
    mesh, console = build_mesh(config.parallel, runtime, seed=config.seed), Console(is_main())
    check_writable("run_dir", config.run_dir / "evaluation.json")
    parents = check_run(config, mesh.data.size)  # all of them, before the first one's answers take an hour
    grader = load_grader(config.grader)
    judges = load_judges(config, mesh)
    tokenizer = tokenizer_of(parents["reference"])
    prompts, dropped = read_prompts(
        config.prompts, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens, too_long=config.too_long
    )
    prompts = prompts[: config.max_prompts]
    console.say(f"prompts: {dropped}; answering {len(prompts)}")
    rows = []
    for path in config.checkpoints:
        policy, _ = load_role(
            path,
            "policy",
            mesh,
            parallel=config.parallel,
            compute=config.compute,
            frozen=True,
            temperature=config.rollout.log_prob_temperature,
        )
        name = path.name if len({p.name for p in config.checkpoints}) == len(config.checkpoints) else str(path)
        answers = answer(policy, prompts, config, judges, tokenizer, mesh)
        texts, grades = answers.texts(tokenizer), []
        if grader and is_main():
            grades = grader([prompt.text for prompt in prompts], texts)
        rows.append(Row(name, answers, texts, grades))
    table = [summarise(row, rows[0], config) for row in rows]
    if is_main():
        _write(config, table, rows, prompts)
    _show(console, table, rows, prompts, config)


def summarise(row: Row, first: Row, config: EvaluateRun) -> dict[str, object]:
    """One line of the table; keys as in COLUMNS, and GRADES where the row has grades."""
    answers, scores = row.answers, row.answers.signals.scores.double()
    numbers, grades = answers.metrics(), {}
    if row.grades:
        mean = sum(row.grades) / len(row.grades)
        grades = {"grade": mean, "grade_win_rate": win_rate(row.grades, first.grades)}
    return {
        "policy": row.name,
        "score": numbers["eval/score"],
        "score_error": (scores.std(correction=0) / len(scores) ** 0.5).item(),
        "win_rate": win_rate(scores.tolist(), first.answers.signals.scores.double().tolist()),
        "kl": numbers["eval/kl"],
        "length": numbers["eval/response_length"],
        "truncated": numbers["eval/truncated_frac"],
        **_shares(answers, config),
        **grades,
    }


def _shares(answers: Answers, config: EvaluateRun) -> dict[str, float]:
    """Mean size of each term's sum over a response, as a share of all three."""
    signals = answers.signals
    rewards = shape_token_rewards(
        policy_log_probs=signals.policy_log_probs,
        ref_log_probs=signals.ref_log_probs,
        dpo_log_probs=signals.dpo_log_probs,
        scores=signals.scores,
        response_mask=answers.rollout.response_mask,
        dpo_coef=config.rto.dpo_coef if config.dpo else 0.0,
        kl_coef=config.rto.kl_coef,
        score_coef=config.rto.score_coef,
        dpo_clip=config.rto.dpo_clip,
    )
    terms = torch.stack([term.sum(-1).abs().double().mean() for term in (rewards.dpo, rewards.kl, rewards.score)])
    shares = (terms / terms.sum().clamp(min=1e-30)).tolist()
    return dict(zip(("dpo_share", "kl_share", "score_share"), shares, strict=True))


def _columns(table: list[dict[str, object]]) -> dict[str, str]:
    return COLUMNS | {name: meaning for name, meaning in GRADES.items() if name in table[0]}


def _write(config: EvaluateRun, table: list[dict[str, object]], rows: list[Row], prompts: Sequence[PromptRow]) -> None:
    columns = _columns(table)
    lines = [list(columns), ["---"] * len(columns), *([format_number(row[name]) for name in columns] for row in table)]
    answers = [
        {"prompt": prompt.text, "responses": {row.name: row.texts[i] for row in rows}}
        for i, prompt in enumerate(prompts)
    ]
    files = {
        "evaluation.json": json.dumps({"columns": columns, "rows": table}, indent=1),
        "evaluation.md": "".join(f"| {' | '.join(line)} |\n" for line in lines),
        "responses.jsonl": json_lines(answers),
    }
    labels = labels_of(config.prompts, prompts)
    for row in rows:
        name, num_tokens = row.name.replace("/", "_"), row.answers.rollout.response_mask.sum(-1).tolist()
        files[f"alpaca_eval/{name}.json"] = alpaca_eval(name, prompts, labels, row.texts)
        files[f"arena_hard/{name}.jsonl"] = arena_hard(name, labels, row.texts, num_tokens)
    for name, text in files.items():
        path = config.run_dir / name
        with writing("run_dir", path):
            path.parent.mkdir(exist_ok=True)
        write_text("run_dir", path, text)


def _show(
    console: Console,
    table: list[dict[str, object]],
    rows: list[Row],
    prompts: list[PromptRow],
    config: EvaluateRun,
) -> None:
    columns = list(_columns(table))
    console.table(f"held out: {len(prompts)} prompts", columns, [[row[name] for name in columns] for row in table])
    for i, prompt in enumerate(prompts[: config.num_shown]):
        console.say(f"\nprompt {i + 1}: {prompt.text}")
        for row in rows:
            score = row.answers.signals.scores[i].item()
            console.say(f"  [{row.name}, score {score:.2f}] {row.texts[i].strip()}")
    console.say(f"\ntable and responses: {config.run_dir}")
