"""The samples of a step as they come in: responses as they end, what the roles say of them as they are scored.

Everything here is on the host and row by row; records for the device are made of any rows, of the same bits whoever
wrote and scored them in whatever order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.run import RTORun
from rto_megatron.data.collate import prompt_batch
from rto_megatron.data.readers import PromptRow
from rto_megatron.data.sampler import batch_rows
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.rollout.engine import Completion, DecodeBatch, Request
from rto_megatron.rollout.guard import rows_to_check
from rto_megatron.rollout.responses import requests_of, rollout_of
from rto_megatron.schedule.lane import Pack, Pass, written_out
from rto_megatron.schedule.work import Item, Sizes, StepInput
from rto_megatron.stages.update import minibatch_rows

PER_TOKEN = ("policy_log_probs", "forward_log_probs", "ref_log_probs", "dpo_log_probs", "values")
PER_SAMPLE = ("raw_scores", "scores", "checked")
FILE = "samples.safetensors"


@dataclass(frozen=True)
class Said:
    """What the roles say of one sample."""

    per_token: np.ndarray
    """[5, tokens] float32: PER_TOKEN, prompt and response."""
    per_sample: np.ndarray
    """[3] float32: PER_SAMPLE; `checked` is 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one item found out, for other groups."""

    step: int
    written: tuple[Completion, ...] = ()
    """`uid` is the row of the step."""
    said: Mapping[int, Said] = field(default_factory=dict)
    """By row."""


class Samples:
    """All samples of one step, as far as they are known."""

    def __init__(self, config: RTORun, prompts: Sequence[PromptRow], tokenizer: Tokenizer, *, step: int) -> None:
        """None is written; which prompts it is about follows from seed and step."""
        picked = batch_rows(len(prompts), config.prompts_per_step, seed=config.seed, step=step)
        self.prompts = prompt_batch([prompts[i] for i in picked], samples_per_prompt=config.samples_per_prompt)
        self.step, self._config, self._tokenizer = step, config, tokenizer
        self.written: dict[int, Completion] = {}
        self.said: dict[int, Said] = {}

    def requests(self) -> list[Request]:
        """One for each row."""
        return requests_of(self.prompts, self._config.rollout, self._config.seed, self.step)

    def known(self) -> StepInput:
        """What a schedule may know of the step beforehand."""
        return StepInput(
            [len(ids) for ids in self.prompts.ids], minibatch_rows(len(self.prompts), self._config, step=self.step)
        )

    def written_out(self, sizes: Sizes) -> tuple[list[Pack], list[int]]:
        """Packs of the step and its rows in the order in which they ended, all being written."""
        prompt_tokens = [len(ids) for ids in self.prompts.ids]
        return written_out(sizes, prompt_tokens, self.lengths, step=self.step, lanes=range(sizes.lanes))

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of each response that has ended, by row."""
        return {row: len(completion.tokens) for row, completion in self.written.items()}

    def contexts(self, rows: Iterable[int]) -> list[int]:
        """Tokens of prompt and response of rows that have ended."""
        return [len(self.prompts.ids[row]) + len(self.written[row].tokens) for row in rows]

    def take(self, found: Found) -> None:
        """Learn what an item has found out."""
        self.written |= {completion.uid: completion for completion in found.written}
        self.said |= found.said

    def rollout(self, rows: Sequence[int]) -> Rollout:
        """Some rows that have ended, as wide as the longest of them."""
        return rollout_of(
            self.prompts.rows(rows),
            [self.written[row] for row in rows],
            self._config.rollout,
            eos_id=self._tokenizer.eos_id,
            pad_id=self._tokenizer.pad_id,
        )

    def signals(self, rows: Sequence[int]) -> Signals:
        """What the roles say of some rows that have been scored."""
        return signals_of(self.rollout(rows), [self.said[row] for row in rows])

    def save(self, folder: Path) -> None:
        """Write a whole step, written and scored, into a file of `folder`."""
        rows = range(len(self.prompts))
        done = [self.written[row] for row in rows]
        tensors = {
            "lengths": torch.tensor([len(c.tokens) for c in done]),
            "truncated": torch.tensor([c.truncated for c in done]),
            "tokens": torch.tensor([token for c in done for token in c.tokens]),
            "log_probs": torch.tensor([p for c in done for p in c.log_probs], dtype=torch.float64),
            "per_token": torch.from_numpy(np.concatenate([self.said[row].per_token for row in rows], 1)),
            "per_sample": torch.from_numpy(np.stack([self.said[row].per_sample for row in rows])),
        }
        save_file(tensors, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote."""
        found = load_file(folder / FILE)
        lengths = found["lengths"].tolist()
        tokens, log_probs = (found[name].split(lengths) for name in ("tokens", "log_probs"))
        for row in range(len(lengths)):
            self.written[row] = Completion(
                uid=row,
                tokens=tokens[row].tolist(),
                log_probs=log_probs[row].tolist(),
                truncated=bool(found["truncated"][row]),
            )
        sizes = [len(ids) + length for ids, length in zip(self.prompts.ids, lengths, strict=True)]
        for row, per_token in enumerate(found["per_token"].split(sizes, dim=1)):
            self.said[row] = Said(per_token.numpy(), found["per_sample"][row].numpy())


def said_of(rows: Sequence[int], rollout: Rollout, signals: Signals) -> dict[int, Said]:
    """Signals of some rows, a row each, on the host."""
    per_token = torch.stack([getattr(signals, name) for name in PER_TOKEN]).cpu().numpy()
    per_sample = torch.stack([getattr(signals, name).float() for name in PER_SAMPLE]).cpu().numpy()
    widths = rollout.num_tokens.tolist()
    return {row: Said(per_token[:, i, : widths[i]].copy(), per_sample[:, i].copy()) for i, row in enumerate(rows)}


def signals_of(rollout: Rollout, said: Sequence[Said]) -> Signals:
    """What was said of each row of a rollout, as a record on the CPU."""
    per_token = torch.zeros(len(PER_TOKEN), *rollout.tokens.shape)
    for i, one in enumerate(said):
        per_token[:, i, : one.per_token.shape[1]] = torch.from_numpy(one.per_token)
    per_sample = torch.from_numpy(np.stack([one.per_sample for one in said], 1))
    numbers = dict(zip((*PER_TOKEN, *PER_SAMPLE), (*per_token, *per_sample), strict=True))
    numbers["checked"] = numbers["checked"].bool()
    cpu = rollout.to(per_token.device)
    return Signals(tokens=cpu.tokens, num_tokens=cpu.num_tokens, **numbers)


def checked_of(pack: Sequence[int], config: RTORun, *, step: int) -> list[int] | None:
    """Places in a pack of the samples that the policy's training forward is asked about; None for all."""
    if not config.rollout.reuse_log_probs:
        return None
    num_samples = config.prompts_per_step * config.samples_per_prompt
    checked = rows_to_check(num_samples, config.rollout, seed=config.seed, step=step)
    return [place for place, sample in enumerate(pack) if sample in checked]


def lengths_of(rollout: Rollout, first: int = 0) -> tuple[dict[int, int], dict[int, int]]:
    """Tokens of each row's prompt and of its response, by sample; the first row is sample `first`."""
    responses = rollout.response_mask.sum(-1)
    prompts = (rollout.num_tokens - responses).tolist()
    return dict(enumerate(prompts, first)), dict(enumerate(responses.tolist(), first))


def make_pass(batch: DecodeBatch, now: Pass | Item, requests: Sequence[Request]) -> list[Completion]:
    """Do what a lane says; the responses that ended."""
    if now.kind == "prefill":
        return batch.admit([requests[sample] for sample in now.samples])
    ended: list[Completion] = []
    for _ in range(now.num_steps):
        ended += batch.decode()
        if not batch.num_live:
            break
    return ended
