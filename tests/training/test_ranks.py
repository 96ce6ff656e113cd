"""Ranks: sums over them, sharded layers, the stop, the schedule; a process left as it was."""
import random
import signal

import pytest
import torch
from helpers import run_ranks

from training.ranks import Stop, flushes_denormals, learning_rate, running


def state_of_process():
    """What a run may change for its whole process, and must put back."""
    return (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), flushes_denormals(),
            torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled(),
            torch.get_default_dtype())


# ---- several ranks ------------------------------------------------------------------------------

SUMS = """
import training.ranks
shapes, calls, all_reduce = [(3,), (2, 4), (4, 10), (1,), (5,)], [], dist.all_reduce

def counting(tensor):
    calls.append(tensor.numel())
    all_reduce(tensor)

def gradients(rank):
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randint(-99, 99, shape, generator=generator).float() for shape in shapes]
    return [None if rank == 2 or (rank == 1 and i == 2) else g for i, g in enumerate(found)]

dist.all_reduce = counting
for bucket_bytes, expected in ((64, [11, 40, 9]), (64 * 2 ** 20, [60])):
    training.ranks.BUCKET_BYTES = bucket_bytes
    calls.clear()
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p, gradient in zip(parameters, gradients(rank)):
        p.grad = gradient
    extras = torch.tensor([1, 10, 100], dtype=torch.float64) * (rank + 1)
    totals = training.ranks.all_reduce_gradients_(parameters, extras)
    assert totals == [6, 60, 600], totals
    assert calls == expected, calls
    for i, p in enumerate(parameters):
        rows = [gradients(r)[i] for r in range(3)]
        assert torch.equal(p.grad, sum(row for row in rows if row is not None)), i
dist.all_reduce = all_reduce
"""
SHARDED_LAYERS = """
model = training.ranks.shard_layers(make_model(), "cpu")
with torch.no_grad():
    model(torch.arange(9))
for layer in model.model.layers:
    assert layer.mlp.up_proj.weight.to_local().numel() == 48 * 32 // 3
    assert layer.self_attn.q_proj.lora_A.shape == (4, 32)
assert model.lm_head.weight.shape == (97, 32)
"""


def test_three_ranks_sum_gradients_in_buckets_and_shard_layers(tmp_path):
    # Sums: whole numbers, exact in any order. Sizes in bytes 12, 32 | 160 | 4, 20 and 12 of extras:
    # three buckets of at most 64, where a larger tensor is alone; or one all-reduce for all. Rank 1
    # has no gradient of the third, rank 2 none at all. Every rank ends with the sums.
    # Layers are whole only while they run. Bug this catches: without a common root every layer is
    # FSDP's root, and roots stay gathered after their forward: all weights in every rank's memory.
    run_ranks(tmp_path, SUMS + SHARDED_LAYERS, ranks=3)


# ---- a process and its settings -----------------------------------------------------------------

@pytest.mark.parametrize("flushed", [False, True])
def test_a_run_leaves_the_process_as_it_found_it(flushed):
    torch.set_flush_denormal(flushed)
    try:
        before = state_of_process()
        for error in (None, ValueError, SystemExit):
            try:
                with running() as (ranks, _), ranks.stop:
                    assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
                    assert flushes_denormals()
                    torch.manual_seed(5)
                    assert signal.getsignal(signal.SIGTERM) == ranks.stop.handle
                    if error:
                        raise error
            except (ValueError, SystemExit) as raised:
                assert type(raised) is error
            assert state_of_process() == before
    finally:
        torch.set_flush_denormal(False)


def test_the_first_signal_waits_for_the_step_and_a_second_ctrl_c_does_not():
    with Stop() as stop:
        assert stop.signal == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


# ---- the schedule -------------------------------------------------------------------------------

def test_learning_rate_warms_up_linearly_and_ends_on_a_cosine_at_zero():
    rates = [learning_rate(step, 2.0, 4, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0) and rates[11] == pytest.approx(2 * 0.03806, rel=1e-3)
