"""Write responses with a Megatron GPT: a key-value cache, continuous admission, early finish.

The scheduler is plain Python and runs the same on every rank of a replica: each admits, finishes and moves the
same sequences in the same step, so no rank tells another what to do.
Per step a pipeline stage hands on hidden states, and the last one returns 16 bytes a sequence. Context ranks have
nothing to share, with one token a sequence: they all do the same, and take the first one's tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.distributed.chunks import model_chunks
from rto_megatron.distributed.replica import agree_over_context, share_from_last_stage
from rto_megatron.errors import ConfigError, DataError
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.rollout.blocks import FixedPool, blocks_of, num_beginning
from rto_megatron.rollout.forward import ForwardPass
from rto_megatron.rollout.recorded import RecordedSteps
from rto_megatron.rollout.sampling import Rows, sample

PREFILL_TOKENS = 8192
"""Prompt tokens of one prefill pass: bounds the memory of its activations."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to write."""

    uid: int
    """The caller's name for it."""
    prompt: tuple[int, ...]
    max_new_tokens: int
    seed: int
    """Its random stream: see `request_seed`."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability; 1 among all."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A response that has ended."""

    uid: int
    tokens: list[int]
    """Sampled ids, the closing EOS included."""
    log_probs: list[float]
    """Nats, of each token under the distribution it was sampled from: see `sample`."""
    truncated: bool
    """Whether the window filled before an EOS."""


@dataclass
class _Sequence:
    """A response being written; its place in the list of live ones is its slot in the cache."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are stored: all but the newest."""
        return len(self.request.prompt) + len(self.tokens) - 1


class RolloutEngine:
    """Generates with the trainer's own modules: no second copy of the weights, nothing to synchronise."""

    def __init__(
        self,
        model: PolicyModel,
        *,
        max_slots: int,
        max_length: int,
        eos_ids: tuple[int, ...],
        prefill_chunk_tokens: int | None = None,
        recorded: bool = False,
        kv_block_tokens: int = 0,
        kv_blocks: int | None = None,
    ) -> None:
        """Take `model`, unwrapped; nothing is allocated before `generate`.

        Args:
            max_slots: sequences that decode together.
            max_length: tokens of prompt and response together.
            eos_ids: end a response, and belong to it.
            prefill_chunk_tokens: of prompts in one forward pass at most; None reads all that are admitted in one.
            recorded: decode by steps of few sizes, which a GPU records: see `RecordedSteps`.
            kv_block_tokens: of a block of the cache, where sequences take blocks as they grow; 0 gives each a slot of
                `max_length`.
            kv_blocks: blocks of a batch; None makes them as they are needed.

        Raises:
            ConfigError: steps are to be recorded, and stages hand hidden states to each other in them.
        """
        if recorded and model.pg_collection.pp.size() > 1:
            raise ConfigError(
                f"rollout.cuda_graphs needs parallel.pipeline 1 where responses are written, got "
                f"{model.pg_collection.pp.size()}; set it to false, or give rollouts a layout of their own "
                "(schedule.rollout)"
            )
        self._prefill_chunk, self._recorded = prefill_chunk_tokens, recorded
        self._block_tokens, self._pool = kv_block_tokens, None
        if kv_blocks is not None:
            self._pool = FixedPool(blocks=kv_blocks, block_tokens=kv_block_tokens, longest=max_length)
            assert blocks_of(max_length, kv_block_tokens) <= kv_blocks, "the config refuses it"
        last = model_chunks(model)[-1]
        self._model, self._max_slots, self._max_length = last, max_slots, max_length
        self._eos_ids = frozenset(eos_ids)
        groups = model.pg_collection
        self._tensor, self._pipeline, self._context = groups.tp, groups.pp, groups.cp
        self._device = next(model.parameters()).device
        self._forward = ForwardPass(model)
        if last.post_process:
            num_ids = last.output_weight().shape[0]
            self._first_id = self._tensor.rank() * num_ids
            mine = range(self._first_id, self._first_id + num_ids)
            banned = [i - self._first_id for i in mine if i >= last.true_vocab or i in last.banned_ids]
            self._banned = torch.tensor(banned, dtype=torch.long, device=self._device)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Write all requests; each is yielded in the step it ends, in one order on all ranks of the replica.

        Every rank of the replica must call this with the same requests and consume it to the end.
        A response depends on the weights and its own request alone.

        Raises:
            DataError: a prompt leaves no room for a token, is empty, or has ids the model does not know.
        """
        for request in requests:
            self._check(request)
        return self._generate(deque(requests))

    def batch(self, requests: Sequence[Request]) -> "DecodeBatch":
        """Slots for these requests, up to `max_slots` at a time; none is begun.

        Made for just these requests and given back with the last of them: training needs the memory.
        """
        for request in requests:
            self._check(request)
        longest = max(self.most_tokens(request) for request in requests)
        num_slots = min(self._max_slots, len(requests))
        return DecodeBatch(self, num_slots=num_slots, max_length=longest)

    def _generate(self, waiting: deque[Request]) -> Iterator[Completion]:
        if not waiting:
            return
        batch = self.batch(waiting)
        while waiting or batch.num_live:
            new = self._admitted(waiting, batch.most_tokens) if waiting else []
            yield from batch.admit(new) if new else batch.decode()

    def _check(self, request: Request) -> None:
        name, length = f"prompt {request.uid}", len(request.prompt)
        if length == 0:
            raise DataError(f"{name}: needs at least one token, got none")
        if length + 1 > self._max_length:
            raise DataError(
                f"{name}: its {length} tokens leave no room for a response, as both together may have "
                f"{self._max_length}; shorten or drop the prompt, or allow longer sequences (model.max_length)"
            )
        if max(request.prompt) >= self._model.true_vocab:
            raise DataError(
                f"{name}: ids must lie below the model's vocabulary of {self._model.true_vocab}, "
                f"got {max(request.prompt)}; does the tokenizer belong to these weights?"
            )

    def most_tokens(self, request: Request) -> int:
        """That its prompt and response may come to."""
        return min(len(request.prompt) + request.max_new_tokens, self._max_length)

    def _admitted(self, waiting: deque[Request], live: list[int]) -> list[Request]:
        """Take waiting requests that have room: as many as one prefill may read.

        Args:
            live: tokens that each response under way may come to.
        """
        first = [self.most_tokens(request) for request in islice(waiting, self._max_slots)]
        num = num_beginning(live, first, slots=self._max_slots, pool=self._pool)
        new: list[Request] = []
        num_tokens = 0
        while len(new) < num and (not new or num_tokens + len(waiting[0].prompt) <= PREFILL_TOKENS):
            num_tokens += len(waiting[0].prompt)
            new.append(waiting.popleft())
        return new


def cut_prompts(lengths: Sequence[int], chunk: int | None) -> list[list[tuple[int, range]]]:
    """Passes of at most `chunk` tokens over prompts of these lengths, in order: (prompt, which of its tokens)."""
    passes: list[list[tuple[int, range]]] = [[]]
    room = chunk or sum(lengths)
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                passes.append([])
                room = chunk or length
            stop = min(length, start + room)
            passes[-1].append((number, range(start, stop)))
            room, start = room - (stop - start), stop
    return passes


class DecodeBatch:
    """Responses that are written together, in the slots of one cache.

    What a pass computes depends on who is in the batch, and that on what it was given: the same calls give the same
    bits. Every rank of a replica makes the same calls.
    """

    def __init__(self, engine: RolloutEngine, *, num_slots: int, max_length: int) -> None:
        """No sequence is live."""
        self._engine, self._max_length = engine, max_length
        self._cache = engine._forward.allocate(
            num_slots=num_slots,
            max_length=max_length,
            block_tokens=engine._block_tokens,
            blocks=None if engine._pool is None else engine._pool.blocks,
        )
        self._steps = None
        if engine._recorded:
            self._steps = RecordedSteps(engine._forward, self._cache, num_slots=num_slots, max_length=max_length)
        self._live: list[_Sequence] = []
        self.num_steps = self.num_tokens = self.num_attended = 0
        """Decode steps so far, tokens drawn in them, and tokens attended to for these."""

    @property
    def num_live(self) -> int:
        """Responses that have begun and not ended."""
        return len(self._live)

    @property
    def most_tokens(self) -> list[int]:
        """That each of these may come to."""
        return [self._engine.most_tokens(sequence.request) for sequence in self._live]

    @property
    def cache_bytes(self) -> int:
        """Keys and values on this rank; of a cache of blocks the most so far, as it does not shrink."""
        return self._cache.store.num_bytes

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> list[Completion]:
        """Read their prompts and draw their first tokens; the responses that ended with it."""
        new = [_Sequence(request) for request in sorted(requests, key=lambda r: len(r.prompt))]
        self._prefill(new, first_slot=len(self._live))
        self._live += new
        return self._retire()

    @torch.inference_mode()
    def decode(self) -> list[Completion]:
        """Draw a token for each live response; those that ended with it."""
        lengths = [sequence.num_cached for sequence in self._live]
        self.num_steps += 1
        self.num_tokens += len(lengths)
        self.num_attended += sum(lengths) + len(lengths)
        ids = [sequence.tokens[-1] for sequence in self._live]
        if self._steps is None:
            self._cache.plan_decode(lengths)
            hidden = self._run(ids)
        else:
            hidden = self._steps.run(ids, lengths, self._engine._device)
        self._append(self._live, hidden)
        return self._retire()

    def _prefill(self, new: list[_Sequence], *, first_slot: int) -> None:
        """Read the prompts, pass by pass; each one's first token is drawn from the hidden state of its last."""
        prompts, last = [sequence.request.prompt for sequence in new], []
        for parts in cut_prompts([len(prompt) for prompt in prompts], self._engine._prefill_chunk):
            lengths = [part.stop - part.start for _, part in parts]
            starts = [part.start for _, part in parts]
            self._cache.plan_prefill(lengths, first_slot=first_slot + parts[0][0], starts=starts)
            hidden = self._run([token for number, part in parts for token in prompts[number][part.start : part.stop]])
            ends = zip(parts, accumulate(lengths), strict=True)
            rows = [end - 1 for (number, part), end in ends if part.stop == len(prompts[number])]
            if hidden is not None:
                last.append(hidden[torch.tensor(rows, dtype=torch.long, device=hidden.device)])
        self._append(new, torch.cat(last) if last else None)

    def _run(self, ids: list[int]) -> Tensor | None:
        """One pass over the rows that the cache was told of; hidden states on the last stage."""
        return self._engine._forward.run(torch.tensor(ids, device=self._engine._device), self._cache)

    def _append(self, sequences: list[_Sequence], hidden: Tensor | None) -> None:
        """Draw each sequence's token from its row of `hidden`, which the last stage has."""
        engine, drawn = self._engine, None
        if hidden is not None:
            drawn = self._draw(hidden, self._rows(sequences))
        drawn = share_from_last_stage(
            drawn, engine._pipeline, shape=(2, len(sequences)), dtype=torch.float64, device=engine._device
        )
        drawn = agree_over_context(drawn, engine._context)
        for sequence, token, log_prob in zip(sequences, *drawn.tolist(), strict=True):
            sequence.tokens.append(int(token))
            sequence.log_probs.append(log_prob)

    def _draw(self, hidden: Tensor, rows: Rows) -> Tensor:
        """[B, H] -> [2, B] float64: tokens and their log-probs; logits exist of `log_prob_chunk` rows at a time."""
        engine, chunk, drawn = self._engine, self._engine._model.log_prob_chunk, []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], engine._model.output_weight()).float()
            drawn.append(
                sample(logits, rows[part], first_id=engine._first_id, banned=engine._banned, group=engine._tensor)
            )
        return torch.stack([torch.cat(parts).double() for parts in zip(*drawn, strict=True)])

    def _rows(self, sequences: list[_Sequence]) -> Rows:
        requests = [sequence.request for sequence in sequences]
        return Rows(
            seeds=torch.tensor([r.seed for r in requests], device=self._engine._device),
            indices=torch.tensor([len(s.tokens) for s in sequences], device=self._engine._device),
            temperatures=tuple(r.temperature for r in requests),
            top_k=tuple(r.top_k for r in requests),
            top_p=tuple(r.top_p for r in requests),
        )

    def _retire(self) -> list[Completion]:
        """Take ended sequences out, the last live one moving into each hole; in order of their slots."""
        live = self._live
        ended = [i for i, sequence in enumerate(live) if self._has_ended(sequence)]
        completions = [self._complete(live[i]) for i in ended]
        for hole in reversed(ended):
            last = live.pop()
            self._cache.end(hole, len(live), last.num_cached)
            if hole < len(live):
                live[hole] = last
        return completions

    def _has_ended(self, sequence: _Sequence) -> bool:
        request, tokens = sequence.request, sequence.tokens
        full = len(tokens) >= request.max_new_tokens or len(request.prompt) + len(tokens) >= self._max_length
        return full or tokens[-1] in self._engine._eos_ids

    def _complete(self, sequence: _Sequence) -> Completion:
        return Completion(
            uid=sequence.request.uid,
            tokens=sequence.tokens,
            log_probs=sequence.log_probs,
            truncated=sequence.tokens[-1] not in self._engine._eos_ids,
        )
