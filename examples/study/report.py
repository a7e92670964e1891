"""The page of the study: JSON with all numbers, Markdown and HTML with what they say, two figures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from html import escape

import numpy as np

from examples.study.figures import Line, draw
from examples.study.records import NUMBERS, write_all
from examples.study.run import Study
from examples.study.statistics import ENOUGH_SEEDS, Band, band, band_of, first_reach

BASELINE = "ppo"
CONTRASTS = (
    ("rto", "ddpo", "the same DPO reward in all: on the tokens, or at the end"),
    ("rto-at-1", "ddpo", "likewise, and with the same settings"),
    ("semi_rto", "ddpo", "the same DPO reward in all: at sentence ends, or at the end"),
    (
        "rs_ppo",
        "ppo",
        "the same return in all, told by token rewards; GAE sees the amount taken off at the end discounted",
    ),
    ("ddpo", "ppo", "both at the end: with the DPO policy's total, or the reward model's score alone"),
    ("drto", "rto", "DRTO's loss for the worst spans at dpo_coef 0.05, or PPO's with the coefficient that was chosen"),
    ("rpp_token", "rpp", "without a critic: token rewards and score, or the score alone"),
)
"""Pairs of methods that differ in one thing."""


def write_report(study: Study) -> None:
    """Read the records, write OUT/results."""
    results = collect(study)
    folder = study.out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: value for name, value in results.items() if name != "methods"}  # its arrays are in the records
    told["chosen"] = {name: entry["chosen"] for name, entry in results["methods"].items()}
    (folder / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    write_all(folder / "runs.jsonl", study.records.values())
    figures = _figures(results)
    for name, svg in figures.items():
        (folder / f"{name}.svg").write_text(svg)
    text = page(results)
    (folder / "results.md").write_text(text)
    (folder / "results.html").write_text(_html(text, figures))
    print(text)
    files = ("results.md", "results.html", "results.json", "runs.jsonl", *(f"{name}.svg" for name in figures))
    print(f"{folder}: {', '.join(files)}")


def collect(study: Study) -> dict:
    """All numbers; a method's arrays are [seed][evaluation]."""
    have, seeds, task = study.records, study.seeds, study.task
    found: dict[str, dict] = {}
    for method in study.methods:
        runs = [study.known(have, seed, method.name) for seed in seeds]
        entry: dict = {"title": method.title, "samples": bool(runs[0].steps)}
        entry["chosen"] = list(method.settings()[study.choose(method)])
        entry["tried"] = []
        if study.has_grid(method):
            golds = study.tried(method)
            entry["tried"] = [{"words": list(w), "gold": g} for w, g in zip(method.settings(), golds, strict=True)]
        entry |= {number: [run.numbers[number] for run in runs] for number in NUMBERS}
        if entry["samples"]:
            entry["steps"] = runs[0].steps
            entry["return"] = [run.numbers["return"] for run in runs]
        found[method.name] = entry
    starts = [study.known(have, seed, "start").numbers for seed in dict.fromkeys(map(task.start_of, seeds))]
    start = {name: [numbers[name][0] for numbers in starts] for name in starts[0]}
    sampled = next((entry for entry in found.values() if entry["samples"]), None)
    if sampled is not None:
        start["gold"] = [run[0] for run in sampled["gold"]]
    return {
        "task": task.name,
        "seeds": list(seeds),
        "samples_per_step": task.samples_per_step,
        "best": task.best,
        "start": start,
        "methods": found,
        "summary": summarise(found, task.samples_per_step),
        "contrasts": contrasts(found),
    }


def summarise(found: dict[str, dict], samples_per_step: int) -> dict[str, dict]:
    """What is compared: each method at the end, against the baseline, on the way, and in the second half."""
    base, summary = found.get(BASELINE), {}
    for name, entry in found.items():
        gold, score = np.array(entry["gold"]), np.array(entry["score"])
        line: dict = {number: asdict(band([run[-1] for run in entry[number]])) for number in NUMBERS}
        if base is not None:
            theirs = np.array(base["gold"])
            line["lead"] = asdict(band(gold[:, -1] - theirs[:, -1]))
            if entry["samples"]:
                line["lead_on_the_way"] = asdict(band(gold[:, 1:].mean(1) - theirs[:, 1:].mean(1)))
                samples = [step * samples_per_step for step in entry["steps"]]

                for level, of in (("end", _end), ("best", _best)):
                    reached = band_of(partial(_reach, samples, gold, theirs, of), len(gold))
                    line[f"samples_to_baseline_{level}"] = asdict(reached) if reached else None
        if entry["samples"]:
            optimised = np.array(entry["return"])
            half = gold.shape[1] // 2
            for number, x in (("gold", gold), ("score", score), ("return", optimised)):
                line[f"late_{number}"] = asdict(band(x[:, -1] - x[:, half]))
            line["collapsed"] = collapsed(gold, optimised)
        summary[name] = line
    return summary


def collapsed(gold: np.ndarray, optimised: np.ndarray) -> list[int]:
    """Places of the seeds whose gold ended below half of its highest while what was optimised went on rising.

    Gold that was never above 0 has no half to fall below.
    """
    peaks = gold.argmax(1)
    return [
        seed
        for seed, peak in enumerate(peaks)
        if gold[seed, -1] < gold[seed, peak] / 2
        and gold[seed, peak] > 0
        and optimised[seed, -1] > optimised[seed, peak]
    ]


def _reach(
    samples: Sequence[float],
    gold: np.ndarray,
    theirs: np.ndarray,
    level: Callable[[np.ndarray], float],
    seeds: np.ndarray,
) -> float | None:
    """Samples after which the mean of some seeds first reaches a level of the baseline's mean of the same seeds."""
    return first_reach(samples, gold[seeds].mean(0).tolist(), level(theirs[seeds].mean(0)))


def _end(curve: np.ndarray) -> float:
    return float(curve[-1])


def _best(curve: np.ndarray) -> float:
    return float(curve.max())


def contrasts(found: dict[str, dict]) -> list[dict]:
    """Paired differences of methods that differ in one thing: at the end, and as a mean over all evaluations."""
    lines = []
    for one, other, meaning in CONTRASTS:
        if one in found and other in found:
            a, b = (np.array(found[name]["gold"]) for name in (one, other))
            end, way = band(a[:, -1] - b[:, -1]), band(a[:, 1:].mean(1) - b[:, 1:].mean(1))
            lines.append({"of": [one, other], "meaning": meaning, "end": asdict(end), "on_the_way": asdict(way)})
    return lines


def page(results: dict) -> str:
    """The Markdown page."""
    methods, summary = results["methods"], results["summary"]
    total = max((entry["steps"][-1] for entry in methods.values() if entry["samples"]), default=0)
    budget, num_seeds = total * results["samples_per_step"], len(results["seeds"])
    best = "" if results["best"] is None else f"; no policy can have more than {results['best']:g}"
    start = {name: band(values) for name, values in results["start"].items()}
    lines = [
        f"# Study `{results['task']}`: {num_seeds} seeds, {budget:,} samples",
        "",
        "Gold on the test prompts after all samples; means over seeds and, in brackets, where 95 % of the means of "
        f"resampled seeds lie{best}. A lead is paired by seed. `won` is the share of prompts on which gold prefers the "
        "response to the start's.",
        "",
        "| method | gold | lead over PPO | won | KL (nats) | proxy score | samples to PPO's end |",
        "|---|---|---|---|---|---|---|",
        f"| start (SFT) | {start['gold']} | | 0.50 | 0 | | |",
    ]
    for name, entry in methods.items():
        line = {k: Band(**v) for k, v in summary[name].items() if isinstance(v, dict)}
        reached = line.get("samples_to_baseline_end")
        samples = _samples(reached, budget) if entry["samples"] else "none used"
        lead = "" if name == BASELINE or "lead" not in line else _told(line["lead"])
        lines.append(
            f"| {entry['title']} | {line['gold']} | {lead} | {line['win_rate'].mean:.2f} | {line['kl'].mean:.1f} "
            f"| {line['score'].mean:.2f} | {samples} |"
        )
    lines += [
        "",
        f"`?`: so many seeds do not tell the two apart: the band includes 0, or they are fewer than {ENOUGH_SEEDS}.",
        "",
    ]
    if any(not entry["chosen"] for entry in methods.values()):
        lines += ["Settings in brackets were not chosen by the grid: they were run after the others had been seen.", ""]
    lines += [_verdict(results), ""]
    lines += ["![Gold against samples](gold-samples.svg)", "", "![Gold against KL](gold-kl.svg)", ""]
    if results["contrasts"]:
        lines += ["## What makes the difference", "", *_differences(results), ""]
    lines += ["## What the methods were given", "", *_inputs(start), ""]
    lines += ["## Reward hacking", "", *_hacking(results), ""]
    tried = any(entry["tried"] for entry in methods.values())
    lines += ["## Grid", "", *_grid(results)] if tried else ["## Settings", "", *_settings(results)]
    return "\n".join(lines) + "\n"


def _verdict(results: dict) -> str:
    summary = results["summary"]
    if "rto" not in summary or BASELINE not in summary:
        return ""
    lead = Band(**summary["rto"]["lead"])
    total = results["methods"]["rto"]["steps"][-1] * results["samples_per_step"]
    above = "cannot be told from" if not lead.excludes_zero else "is above" if lead.low > 0 else "is below"
    text = f"At equal samples RTO {above} PPO by gold: lead {lead}."
    for level, title in (("end", "PPO's final gold"), ("best", "the highest gold that PPO has on the way")):
        reached = summary["rto"][f"samples_to_baseline_{level}"]
        if reached is None:
            text += f" RTO's mean never reaches {title}."
        elif reached["mean"] == 0:
            text += f" The start is not below {title}, so how soon RTO's mean reaches it says nothing."
        else:
            share = Band(*(reached[part] / total for part in ("mean", "low", "high")))
            text += f" RTO's mean reaches {title} after {share} of PPO's samples."
    return text


def _differences(results: dict) -> list[str]:
    lines = ["Differences of gold between methods that differ in one thing:", ""]
    lines += ["| methods | at the end | mean on the way | |", "|---|---|---|---|"]
    for contrast in results["contrasts"]:
        titles = " - ".join(results["methods"][name]["title"] for name in contrast["of"])
        end, way = Band(**contrast["end"]), Band(**contrast["on_the_way"])
        lines.append(f"| {titles} | {_told(end)} | {_told(way)} | {contrast['meaning']} |")
    return lines


def _told(difference: Band) -> str:
    return f"{difference}{'' if difference.excludes_zero else ' ?'}"


def _samples(reached: Band | None, budget: int) -> str:
    if reached is None:
        return "not reached"
    high = f"{reached.high:.0f}" if np.isfinite(reached.high) else f"more than {budget}"
    return f"{reached.mean:.0f} ({reached.low:.0f} to {high})"


def _inputs(start: dict[str, Band]) -> list[str]:
    return [
        "Share of held-out pairs that the reward model orders as their labels do: "
        f"{start['reward_accuracy']}; that the "
        f"DPO policy does, which RTO reads: {start['dpo_accuracy']}. Both learned from the same pairs, whose "
        "labels are gold with noise.",
    ]


def _hacking(results: dict) -> list[str]:
    lines = [
        "Change from the middle of training to its end: of gold, of the return that the method maximises (all terms, "
        "on training prompts), of the reward model's score. Collapsed: seeds whose gold ended below half of its "
        "highest while the return went on rising.",
        "",
        "| method | gold | return | score | collapsed | |",
        "|---|---|---|---|---|---|",
    ]
    for name, line in results["summary"].items():
        if "late_gold" in line:
            gold, optimised, score = (Band(**line[f"late_{number}"]) for number in ("gold", "return", "score"))
            hacked = (
                "proxy up, gold down"
                if gold.excludes_zero and gold.high < 0 and max(score.low, optimised.low) > 0
                else ""
            )
            seeds = f"{len(line['collapsed'])} of {len(results['seeds'])}"
            lines.append(
                f"| {results['methods'][name]['title']} | {gold} | {optimised} | {score} | {seeds} | {hacked} |"
            )
    return lines


def _grid(results: dict) -> list[str]:
    lines = [
        "Gold on the validation prompts at the end, of tuning seeds that no result is of; the highest mean was taken.",
        "",
    ]
    lines += ["| method | setting | mean | of each seed |", "|---|---|---|---|"]
    for entry in results["methods"].values():
        for tried in entry["tried"]:
            mark = "**" if tried["words"] == entry["chosen"] else ""
            words = " ".join(word.removeprefix("--") for word in tried["words"])
            mean = sum(tried["gold"]) / len(tried["gold"])
            each = ", ".join(f"{gold:.2f}" for gold in tried["gold"])
            lines.append(f"| {entry['title']} | {mark}{words}{mark} | {mean:.2f} | {each} |")
    return lines


def _settings(results: dict) -> list[str]:
    lines = ["One each, named beforehand; no grid was tried.", "", "| method | setting |", "|---|---|"]
    for entry in results["methods"].values():
        words = " ".join(word.removeprefix("--") for word in entry["chosen"])
        lines.append(f"| {entry['title']} | {words} |")
    return lines


def _figures(results: dict) -> dict[str, str]:
    by_samples, by_kl = [], []
    for entry in results["methods"].values():
        if not entry["samples"]:
            continue
        bands = [band(column) for column in zip(*entry["gold"], strict=True)]
        x = [step * results["samples_per_step"] for step in entry["steps"]]
        mean = [b.mean for b in bands]
        by_samples.append(Line(entry["title"], x, mean, [b.low for b in bands], [b.high for b in bands]))
        by_kl.append(Line(entry["title"], [float(np.mean(c)) for c in zip(*entry["kl"], strict=True)], mean))
    best = {"level": results["best"], "level_title": "best possible"}
    return {
        "gold-samples": draw(by_samples, x_label="samples", y_label="gold", **best),
        "gold-kl": draw(by_kl, x_label="KL to the start (nats a response)", y_label="gold", **best),
    }


def _html(text: str, figures: dict[str, str]) -> str:
    """The Markdown as it is, and the figures: one file that loads nothing."""
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
    head = '<!doctype html><meta charset="utf-8"><title>Study</title><body style="font-family:sans-serif;margin:2em">'
    return f"{head}{''.join(figures.values())}<pre style='white-space:pre-wrap'>{escape(plain)}</pre>\n"
