"""Steps of few sizes give what steps of any size give."""

import gc
import weakref

import torch

from rto_megatron.distributed.runtime import Recording
from rto_megatron.rollout import recorded
from rto_megatron.rollout.recorded import RecordedSteps
from tests.rollout.test_kv_cache import attend, full_attention, make_cache, packed, prefill, random_sequence

CPU = torch.device("cpu")


class OneLayer:
    """Attention alone: a row's token says whose query, key and value it has, and at which place."""

    def __init__(self, sequences):
        self.sequences, self.num_calls = sequences, 0

    def run(self, tokens, cache):
        self.num_calls += 1
        rows = [divmod(token, 100) for token in tokens.tolist()]
        parts = [packed([self.sequences[s]], [place], [place + 1]) for s, place in rows]
        return attend(cache, 0, *(torch.cat(each) for each in zip(*parts, strict=True)))


def test_rows_and_places_are_padded_and_nothing_else_changes(monkeypatch):
    monkeypatch.setattr(recorded, "WIDTH", 4)
    sequences, cache = [random_sequence(14, seed) for seed in range(3)], make_cache(num_slots=4)
    want, lengths = [full_attention(*s) for s in sequences], [2, 5, 3]
    prefill(cache, sequences, lengths)
    steps = RecordedSteps(OneLayer(sequences), cache, num_slots=4, max_length=16)
    for step in range(8):
        now = [n + step for n in lengths]
        out = steps.run([100 * s + n for s, n in enumerate(now)], now, CPU)
        torch.testing.assert_close(out, torch.stack([want[s][n] for s, n in enumerate(now)]))
    # three rows are four; 6 to 13 places are 8, 12 and 16
    assert sorted(steps._made) == [(4, 8), (4, 12), (4, 16)]
    steps.run([2 * 100 + 11], [11], CPU)
    assert len(steps._made) == 4


def test_a_cache_goes_with_the_last_one_who_needs_it():
    sequences, cache = [random_sequence(4, 0)], make_cache(num_slots=1)
    prefill(cache, sequences, [2])
    steps, seen = RecordedSteps(OneLayer(sequences), cache, num_slots=1, max_length=16), weakref.ref(cache)
    steps.run([2], [2], CPU)
    gc.disable()  # or it may find a cycle in time
    try:
        del steps, cache
        assert seen() is None
    finally:
        gc.enable()


def test_a_recording_reads_its_tensors_anew():
    held = torch.tensor([1.0, 2.0])
    recording = Recording(lambda: held * 2, CPU)
    held.copy_(torch.tensor([3.0, 4.0]))
    assert recording.again().tolist() == [6.0, 8.0]
