"""Sampling: the cache against recomputing everything, exact distributions, seeds."""
import math
from types import SimpleNamespace

import pytest
import torch
from plain import random_weights
from torch.testing import assert_close

import generate as generate_file
from generate import (Sampling, cache_slots, generate, generate_tokens, nucleus, row_seeds,
                      sample)
from kernels import linear_logps
from lora import add_lora, lora_disabled, lora_layers
from model import Llama, LlamaConfig

SHAPE = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, max_position_embeddings=128)
MHA, GQA = LlamaConfig(**SHAPE), LlamaConfig(**SHAPE, num_key_value_heads=2)
ROPE = LlamaConfig(**SHAPE, num_key_value_heads=1, rope_factor=4.0)
TIED = LlamaConfig(**SHAPE, tie_word_embeddings=True)
each_config = pytest.mark.parametrize("config", [MHA, GQA, ROPE, TIED],
                                      ids=["mha", "gqa", "mqa-rope-factor", "tied"])


def make_model(config, seed=0, dtype=torch.float64):
    model = Llama(config).to(dtype)
    model.load_state_dict({name: w.to(dtype) for name, w in random_weights(config, seed).items()})
    return model


def make_prompts(lengths, seed=0, vocab_size=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def from_scratch(model, prompt, new):
    """Greedy tokens without a cache: the whole sequence, every step."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int((model(torch.tensor(ids))[-1] @ model.lm_head.weight.T).argmax()))
    return ids[len(prompt):]


def make_adapter(model, seed=3):
    add_lora(model, r=3, alpha=6, dropout=0.5, target_modules=("q_proj", "v_proj", "down_proj"))
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator,
                                        dtype=layer.lora_B.dtype)
    return model


# ---- the cache ----------------------------------------------------------------------------------

@each_config
def test_greedy_equals_recomputing_every_step(config):
    # A slot, mask or position off by one changes the argmax within a few of 20 tokens.
    model, prompts = make_model(config), make_prompts([*range(1, 41, 3), 40, 1])
    expected = [from_scratch(model, prompt, 20) for prompt in prompts]
    assert generate(model, prompts, 20, temperature=0, eos_id=None) == expected


def test_prompts_of_one_length_and_one_prompt_alone():
    # Equal lengths: nothing is masked; alone: the prefill is one sequence.
    model = make_model(GQA)
    for lengths in ([5, 5, 5], [7], [1]):
        prompts = make_prompts(lengths)
        assert generate(model, prompts, 9, temperature=0, eos_id=None) == [
            from_scratch(model, prompt, 9) for prompt in prompts]


def test_prompts_longer_than_one_prefill_stream(monkeypatch):
    # Groups of at most 16 tokens; the prompt of 20 tokens is a group of its own.
    monkeypatch.setattr(generate_file, "PREFILL_TOKENS", 16)
    model, prompts = make_model(GQA), make_prompts([3, 20, 9, 7, 16, 1, 1])
    seen, forward = [], model.forward
    model.forward = lambda ids, *rest: seen.append(len(ids)) or forward(ids, *rest)
    rows = generate(model, prompts, 5, temperature=0, eos_id=None)
    assert seen == [3, 20, 9 + 7, 16, 1 + 1, 7, 7, 7, 7]
    model.forward = forward
    assert rows == [from_scratch(model, prompt, 5) for prompt in prompts]


def test_equal_prompts_are_run_once():
    model, (a, b) = make_model(GQA), make_prompts([6, 4])
    seen, forward = [], model.forward
    model.forward = lambda ids, *rest: seen.append(len(ids)) or forward(ids, *rest)
    rows = generate(model, [a, b, a, a, b], 3, temperature=0, eos_id=None)
    assert seen == [6 + 4, 5, 5]                     # one prefill, two steps of five rows
    assert rows[0] == rows[2] == rows[3] and rows[1] == rows[4] and rows[0] != rows[1]
    model.forward = forward
    assert rows[:2] == [from_scratch(model, prompt, 3) for prompt in (a, b)]


@each_config
def test_logps_of_the_logits_sampled_from_equal_a_teacher_forced_pass(config, monkeypatch):
    model, prompts = make_model(config), make_prompts([3, 17, 9])
    logits, original = [], generate_file.next_logits
    monkeypatch.setattr(generate_file, "next_logits",
                        lambda *given: logits.append(original(*given)) or logits[-1])
    rows = generate(model, prompts, 8, eos_id=None, generator=0)
    logps = torch.stack(logits, 1).log_softmax(-1)                               # [B, 8, V]
    for row, (prompt, ids) in enumerate(zip(prompts, rows)):
        with torch.no_grad():
            hidden = model(torch.tensor(prompt + ids[:-1]))[len(prompt) - 1:]
        labels = torch.tensor(ids)
        expected = linear_logps(hidden, hidden[:0], model.lm_head.weight.detach(), labels,
                                labels[:0]).policy_logps
        assert_close(logps[row].gather(1, labels[:, None])[:, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_lower_precision_stays_near_float64(dtype, atol, monkeypatch):
    # bf16 keeps 8 bits; logits here are of order 2 and pass three layers.
    prompts, logits, original = make_prompts([3, 17, 9]), [], generate_file.next_logits
    monkeypatch.setattr(generate_file, "next_logits",
                        lambda *given: logits.append(original(*given)) or logits[-1])
    for model in (make_model(GQA), make_model(GQA, dtype=dtype)):
        generate(model, prompts, 1, temperature=0)
        generate(model, [p + [5] for p in prompts], 1, temperature=0)
    for exact, rounded in zip(logits[:2], logits[2:]):
        assert (rounded - exact).abs().mean() < atol


def test_logits_that_are_not_finite_end_in_a_sentence():
    # The cumulative sum is NaN, and the id would be one behind the vocabulary's last.
    model = make_model(GQA)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match="token 1 has logits that are not finite"):
        generate(model, make_prompts([3, 5]), 4, generator=0)


def test_a_gpu_samples_as_many_tokens_as_half_of_its_free_memory_holds(monkeypatch):
    # A slot: 2 · L 3 · Hkv 2 · Dh 6 numbers of 8 bytes. Room for 100 of them beside the weights.
    model = make_model(GQA)
    weights = sum(p.nbytes for p in model.parameters())
    slot = 2 * 3 * 2 * 6 * 8
    fake = SimpleNamespace(config=model.config, parameters=model.parameters, lm_head=SimpleNamespace(
        weight=SimpleNamespace(is_cuda=True, device="cuda:0", element_size=lambda: 8)))
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=weights + 2 * 50 * slot))
    assert cache_slots(fake, 1000) == 50 and cache_slots(fake, 20) == 20
    assert cache_slots(model, 1000) == 1000                                      # a CPU


# ---- seeds --------------------------------------------------------------------------------------

def test_a_row_depends_on_its_prompt_and_seed_only():
    # All at once, in two batches, reversed, one by one, and beside rows that stop early.
    model, prompts = make_model(GQA), make_prompts([1, 30, 7, 7, 19, 3, 12])
    seeds = row_seeds(5, len(prompts))
    rows = generate(model, prompts, 25, temperature=1.5, top_p=0.9, eos_id=4, generator=seeds)
    assert len({len(row) for row in rows}) > 2       # EOS came early in some rows
    options = dict(temperature=1.5, top_p=0.9, eos_id=4)
    assert generate(model, prompts, 25, generator=5, **options) == rows
    assert generate(model, prompts[::-1], 25, generator=seeds[::-1], **options) == rows[::-1]
    assert [generate(model, [p], 25, generator=[s], **options)[0]
            for p, s in zip(prompts, seeds)] == rows
    assert (generate(model, prompts[:3], 25, generator=5, **options)
            + generate(model, prompts[3:], 25, generator=seeds[3:], **options)) == rows
    # fewer tokens: the same beginning
    assert generate(model, prompts, 6, generator=5, **options) == [row[:6] for row in rows]


def test_samples_of_one_prompt_differ_and_follow_torchs_seed():
    model, (prompt,) = make_model(MHA), make_prompts([5])
    rows = generate(model, [prompt] * 8, 10, eos_id=None, generator=1)
    assert len(set(map(tuple, rows))) == 8
    torch.manual_seed(3)
    first = generate(model, [prompt], 10), generate(model, [prompt], 10)
    torch.manual_seed(3)
    assert (generate(model, [prompt], 10), generate(model, [prompt], 10)) == first
    assert first[0] != first[1]
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert generate(model, [prompt] * 8, 10, eos_id=None, generator=generators[0]) == rows
    assert row_seeds(generators[1], 8) == row_seeds(1, 8) == row_seeds(1, 20)[:8]


# ---- sampling -----------------------------------------------------------------------------------

def chi_square(counts, probs):
    """(statistic, number of cells): Σ (n_i - n p_i)² / (n p_i) over cells of positive p."""
    expected = counts.sum() * probs
    used = probs > 0
    assert counts[~used].sum() == 0
    return float(((counts - expected)[used] ** 2 / expected[used]).sum()), int(used.sum())


def test_a_temperature_that_would_overflow_is_greedy():
    # 8 / 1e-38 is infinite, and infinity less itself no number: ids beyond the vocabulary came out.
    logits = torch.tensor([[1.0, 8.0, 3.0]])
    for temperature in (0, 1e-38, 1e-5):
        assert sample(logits, torch.tensor([0.99]).double(), temperature, 1.0).tolist() == [1]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3)])
def test_samples_follow_the_distribution(temperature, top_p):
    # 20,000 draws with fixed seeds. Chi-square has mean k - 1 and deviation sqrt(2 (k - 1)); a
    # wrong temperature or nucleus gives hundreds.
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, -3.0], dtype=torch.float64)
    probs = (logits / temperature).softmax(0)
    by_mass, mass, chosen = sorted(range(6), key=lambda i: -probs[i]), 0.0, []
    while mass < top_p and len(chosen) < 6:
        chosen.append(by_mass[len(chosen)])
        mass += float(probs[chosen[-1]])
    truth = torch.zeros(6, dtype=torch.float64)
    truth[chosen] = probs[chosen] / probs[chosen].sum()
    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = sample(logits.expand(20000, 6), noise, temperature, top_p).bincount(minlength=6)
    statistic, cells = chi_square(counts.double(), truth)
    assert statistic < (cells - 1) + 4 * math.sqrt(2 * (cells - 1)) + 1e-9


def test_generated_tokens_follow_the_models_distribution():
    # First and second token of 4,000 samples of one prompt, against the model's own numbers.
    config = LlamaConfig(**(SHAPE | {"vocab_size": 7}), num_key_value_heads=2)
    model, prompt = make_model(config), [1, 5, 3]
    rows = torch.tensor(generate(model, [prompt] * 4000, 2, eos_id=None, generator=0))
    with torch.no_grad():
        first = (model(torch.tensor(prompt))[-1] @ model.lm_head.weight.T).softmax(0)
        second = sum(first[a] * (model(torch.tensor([*prompt, a]))[-1]
                                 @ model.lm_head.weight.T).softmax(0) for a in range(7))
    for column, probs in enumerate((first, second)):
        statistic, cells = chi_square(rows[:, column].bincount(minlength=7).double(), probs)
        assert statistic < 6 + 4 * math.sqrt(12)


def test_nucleus_by_hand():
    # 0.5 + 0.25 = 0.75: enough for 0.75, one more from 0.76 on; ties keep the lower ids.
    probs = torch.tensor([[0.0625, 0.25, 0.5, 0.125, 0.0625]])
    for top_p, chosen in ((0.1, [2]), (0.5, [2]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [1, 2, 3]),
                          (0.9, [0, 1, 2, 3]), (0.95, [0, 1, 2, 3, 4])):
        assert nucleus(probs, top_p)[0].nonzero()[:, 0].tolist() == chosen, top_p
    flat = torch.full((1, 8), 0.125)
    assert nucleus(flat, 0.3)[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    # rows do not share a border
    both = nucleus(torch.cat([probs, probs.flip(1)]), 0.6)
    assert_close(both, torch.cat([nucleus(probs, 0.6), nucleus(probs.flip(1), 0.6)]))


def test_noise_at_the_edges_never_picks_an_impossible_token():
    # token 0 and the last have probability 0; noise 0 and 1 - 2^-53 are the extremes of rand
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]]).expand(2, 4)
    noise = torch.tensor([0.0, 1 - 2.0 ** -53], dtype=torch.float64)
    assert sample(logits, noise, 1.0, 1.0).tolist() == [1, 2]
    assert sample(logits, noise, 1.0, 0.5).tolist() == [2, 2]


# ---- EOS, adapters, modes -----------------------------------------------------------------------

def test_a_row_ends_with_eos_and_the_others_go_on():
    model, prompts = make_model(GQA), make_prompts([9, 2, 30, 9, 14, 5])
    free = generate(model, prompts, 30, temperature=0, eos_id=None)
    eos_id = free[2][4]
    cut = [row[:row.index(eos_id) + 1] if eos_id in row else row for row in free]
    assert len({len(row) for row in cut}) > 1        # some stop, at different times
    assert generate(model, prompts, 30, temperature=0, eos_id=eos_id) == cut
    assert model.config.eos_token_id == 2            # left out: the model's own
    by_default = generate(model, prompts, 30, temperature=0)
    assert by_default == [row[:row.index(2) + 1] if 2 in row else row for row in free]


def test_each_of_several_ids_ends_a_row():
    # An int, any collection, None for none; left out, all of the model's own list (Llama-3 has 3).
    model, prompts = make_model(GQA), make_prompts([9, 2, 30, 9, 14, 5])
    options = dict(temperature=2.0, generator=5)
    free = generate(model, prompts, 30, eos_id=None, **options)
    ends = [free[0][7], next(i for i in free[1] if i not in free[0])]

    def cut(row):
        return row[:min((row.index(i) for i in ends if i in row), default=len(row)) + 1]

    expected = [cut(row) for row in free]
    assert {row[-1] for row in expected} >= set(ends)
    for eos_id in (ends, tuple(ends), frozenset(ends)):
        assert generate(model, prompts, 30, eos_id=eos_id, **options) == expected
    assert generate(model, prompts, 30, eos_id=[], **options) == free
    model.config = LlamaConfig(**SHAPE, num_key_value_heads=2, eos_token_id=tuple(ends))
    assert generate(model, prompts, 30, **options) == expected


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ids_without_a_piece_are_never_sampled(temperature):
    # A padded embedding: rows that no text belongs to, here the likeliest of all.
    model, prompts = make_model(GQA), make_prompts([9, 2, 5])
    unused = [7, 58, 59, 60]
    model.lm_head.weight.data[unused] = 0
    hidden = torch.tensor(prompts[0])
    model.lm_head.weight.data[60] = 50 * model(hidden)[-1]         # wins after the first prompt
    options = dict(temperature=temperature, eos_id=None, generator=1)
    assert 60 in sum(generate(model, prompts, 20, **options), [])
    rows = generate(model, prompts, 20, **options, unused_ids=unused)
    assert not set(unused) & set(sum(rows, []))


def test_adapters_on_off_and_fresh():
    prompts = make_prompts([4, 11])
    base = generate(make_model(GQA), prompts, 12, temperature=0, eos_id=None)
    fresh = add_lora(make_model(GQA), r=2, alpha=4, dropout=0.5)
    assert generate(fresh, prompts, 12, temperature=0, eos_id=None) == base       # lora_B = 0
    model = make_adapter(make_model(GQA))
    policy = generate(model, prompts, 12, temperature=0, eos_id=None)
    model.eval()
    assert policy == [from_scratch(model, prompt, 12) for prompt in prompts] != base
    with lora_disabled(model):
        assert generate(model, prompts, 12, temperature=0, eos_id=None) == base


def test_no_dropout_no_gradient_and_the_training_mode_comes_back():
    model, prompts = make_adapter(make_model(GQA)).train(), make_prompts([4, 11])
    rows = generate(model, prompts, 12, temperature=0, eos_id=None)
    assert rows == generate(model.eval(), prompts, 12, temperature=0, eos_id=None)
    model.train()
    steps = generate_tokens(model, prompts, Sampling(12))
    next(steps)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    steps.close()                                    # as after Ctrl-C
    assert all(module.training for module in model.modules())
    model(torch.tensor(prompts[0])).sum().backward()                   # weights are ordinary ones


def test_no_prompts_no_answers():
    assert generate(make_model(GQA), [], 5) == []


def test_every_setting_of_a_sampling_counts():
    # A setting that gets lost on its way to the tokens gives the tokens of another value.
    model, prompts = make_model(GQA), make_prompts([9, 2])
    settings = vars(Sampling(30, 1.5, 0.7, None))
    rows = generate(model, prompts, **settings, generator=3)
    changes = dict(max_new_tokens=29, temperature=1.0, top_p=1.0, eos_id=rows[0][5],
                   unused_ids=[rows[0][5]])
    assert settings.keys() == changes.keys()
    for name, value in changes.items():
        assert generate(model, prompts, **settings | {name: value}, generator=3) != rows, name


@pytest.mark.parametrize("prompts, options, words", [
    ([[1], []], {}, ["prompt 1", "empty"]),
    ([[1, 61]], {}, ["prompt 0", "1..61", "0..60"]),
    ([[1], [-1]], {}, ["prompt 1", "-1"]),
    ([[1] * 120], dict(max_new_tokens=9), ["prompt 0", "120", "9", "128"]),
    ([[1]], dict(max_new_tokens=0), ["max_new_tokens", "0"]),
    ([[1]], dict(temperature=-0.5), ["temperature", "-0.5"]),
    ([[1]], dict(temperature=math.nan), ["temperature", "nan"]),
    ([[1]], dict(top_p=0.0), ["top_p", "0.0"]),
    ([[1]], dict(top_p=1.5), ["top_p", "1.5"]),
    ([[1], [2]], dict(generator=[7]), ["1 seeds", "2 prompts"])])
def test_bad_input_is_refused_in_one_sentence(prompts, options, words):
    with pytest.raises(ValueError) as error:
        generate(make_model(GQA), prompts, **({"max_new_tokens": 4} | options))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_last_position_of_the_model_can_be_used():
    model, (prompt,) = make_model(ROPE), make_prompts([120])
    assert generate(model, [prompt], 8, temperature=0, eos_id=None) == [
        from_scratch(model, prompt, 8)]
