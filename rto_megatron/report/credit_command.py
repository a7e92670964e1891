"""`report credit`: what every token earned, in the evaluations of a run or in a text of the user's own."""

from dataclasses import replace
from pathlib import Path

from rto_megatron.credit.page import PAGE, draw
from rto_megatron.credit.record import FOLDER, file_of, read_evaluation, stored_steps
from rto_megatron.errors import ConfigError, DataError
from rto_megatron.report.credit_options import Options
from rto_megatron.report.words import one_run, read_words, write_page

USAGE = """python -m rto_megatron report credit RUN_DIR [--before=STEP] [--after=STEP] [--out=FILE]
       python -m rto_megatron report credit --checkpoint=RUN --text=FILE [--prompt=TEXT] [--reference=RUN --dpo=RUN
                                            --reward_model=RUN --critic=RUN] [--out=FILE]"""


def main(words: list[str]) -> None:
    """Draw the page and print where it is."""
    runs, options = read_words(Options, words, USAGE)
    if options.checkpoint is not None:
        if runs:
            raise ConfigError(f"report credit takes a run folder or --checkpoint, got {runs[0]} and both: {USAGE}")
        from rto_megatron.report.credit_text import evaluate_text  # Megatron, which pages of files do without

        evaluation = evaluate_text(options)
        write_page(
            options.out or options.text.with_name(f"{options.text.name}.credit.html"),
            draw(evaluation.name, [evaluation]),
        )
        return
    run_dir = one_run(runs, USAGE)
    steps = stored_steps(run_dir)
    if not steps:
        raise DataError(_why_none(run_dir))
    wanted = [options.before if options.before is not None else steps[0]]
    wanted.append(options.after if options.after is not None else steps[-1])
    for name, step in zip(("before", "after"), wanted, strict=True):
        if step not in steps:
            raise ConfigError(f"{name} must be a step of an evaluation of {run_dir}: {_named(steps)}; got {step}")
    evaluations = [read_evaluation(file_of(run_dir, step)) for step in dict.fromkeys(wanted)]
    if options.responses is not None:
        evaluations = [replace(e, responses=e.responses[: options.responses]) for e in evaluations]
    write_page(options.out or run_dir / PAGE, draw(run_dir.resolve().name, evaluations))


def _why_none(run_dir: Path) -> str:
    if not run_dir.is_dir():
        return f"{run_dir}: there is no such run folder"
    return (
        f"{run_dir / FOLDER}: holds no token credit: an rto or ppo run stores it at every evaluation, which needs "
        "data.eval and credit.responses above 0; or draw it of a text of your own, with --checkpoint and --text"
    )


def _named(steps: list[int], most: int = 20) -> str:
    shown = ", ".join(map(str, steps[-most:]))
    return shown if len(steps) <= most else f"... {shown}"
