"""RLHF by PPO: maximise E[r_phi(x, y)] - beta KL(pi || pi_ref) (ULMA paper, Eq. 3).

    python train.py --method reward_model --num_train_epochs 2 --output_dir runs/reward_model
    python -m rlhf.ppo --reward_model runs/reward_model               RLHF, on the embedded world
    python -m rlhf.ppo --reward_model runs/pointwise_reward_model     point-wise RLHF
    torchrun --standalone --nproc_per_node=8 -m rlhf.ppo --reward_model runs/hh-reward \\
        --batch_size 512
    python eval.py runs/rlhf runs/pointwise_rlhf

A step: num_generations responses are sampled from the policy to every prompt of a batch, each rank
its share; one pass without gradients gives log-probs of policy and reference, values and rewards;
ranks exchange them, so each knows the whole batch; then num_ppo_epochs passes over it in at most
num_mini_batches clipped updates, each divided by the tokens of its whole minibatch.

Policy, reference, reward model and value function share one set of frozen weights: the reference is
the policy with its adapter off, the others have adapters of their own. The value function starts as
a copy of the reward model, adapter and head, which already scores partial answers.
The base model and the adapter's shape are the reward model's; so are some flags, if not given.
missing_eos_penalty is no part of Eq. 3: without it answers that never end cost nothing.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()
    from files.cli import parse_first
    from rlhf.flags import build_parser
    parse_first(build_parser(__doc__).parse_args)

import argparse
import math
import os
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import ModuleDict
from torch.optim import Optimizer

from data import describe_data, read_prompts, split_by_prompt
from files.cli import run_cli, time_left
from generate import Sampling, row_seeds
from kernels import choose_linear_logps
from lora import add_lora, add_score_head, load_adapter, share_base
from model import Llama
from packing import (Tree, build_stream, deal, derived_seed, epoch_batches, pack, plan_batches,
                     truncate)
from rlhf.flags import INHERITED, WORLD_FLAGS, build_parser, check_flags
from rlhf.formulas import clipped_policy_loss, clipped_value_loss, gae, kl_penalised_rewards, whiten
from rlhf.rollouts import (Rollout, batch_metrics, exchange, joined, sample_responses,
                           score_responses, token_values, true_rewards, world_rewards)
from step import Compute, attention_for, token_logps
from tokenizer import Tokenizer, encode_prompt
from training.checkpoint import (RunFolder, base_name, is_reward_model, load_run, read_run, resume,
                                 save_final, save_or_stop, trainable, trained_template)
from training.output import claim_output_dir, own_output_dir, run_flags, write_metrics
from training.ranks import (MAX_GRAD_NORM, Ranks, all_reduce_gradients_, clip_gradients_,
                            learning_rate, running)
from training.start_check import checked
from world import on_world


# ---- one update ---------------------------------------------------------------------------------

def add_advantages(rollouts: list[Rollout], beta: float, gamma: float, lam: float) -> list[Rollout]:
    """Fill in advantages and returns: of the whole batch, since they are whitened over it."""
    lengths = torch.tensor([len(ids) for rollout in rollouts for ids in rollout.response_ids])
    response_ids = torch.arange(len(lengths)).repeat_interleave(lengths)         # [N]
    logps, reference_logps, values = (joined(rollouts, name) for name in (       # [N] each
        "per_token_logps", "reference_per_token_logps", "values"))
    scores = logps.new_tensor([score for rollout in rollouts for score in rollout.scores])     # [R]
    rewards = kl_penalised_rewards(logps, reference_logps, response_ids, scores, beta)
    advantages = gae(rewards, values, response_ids, gamma, lam)                  # [N]
    sizes = [len(rollout.per_token_logps) for rollout in rollouts]
    columns = zip(whiten(advantages).split(sizes), (advantages + values).split(sizes))
    return [replace(rollout, advantages=a, returns=r) for rollout, (a, r) in zip(rollouts, columns)]


UPDATE_METRICS = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg",
                  "policy/approxkl_avg")


@dataclass(frozen=True)
class Clipping:
    """PPO's settings of one update."""
    cliprange: float = 0.2           # of the policy's ratio
    cliprange_value: float = 0.2     # of the value, nats
    vf_coef: float = 0.1             # weight of the value loss


def minibatch_gradient(models: ModuleDict, rollouts: list[Rollout], num_tokens: int,
                       clipping: Clipping, compute: Compute) -> Tensor:
    """Forward and backward of this rank's share of a minibatch; returns [loss, *UPDATE_METRICS].

    models       "policy" and "value"
    num_tokens   of the responses of the whole minibatch: what the loss is divided by
    """
    totals = torch.zeros(1 + len(UPDATE_METRICS), dtype=torch.float64, device=compute.device)
    for group in pack(rollouts, compute.micro_tokens):
        stream = build_stream(group, compute.device, attention=compute.attention)
        old_logps, old_values, advantages, returns = (                           # [N] each
            joined(group, name, compute.device)
            for name in ("per_token_logps", "values", "advantages", "returns"))
        logps = token_logps(models["policy"], stream, compute.linear_logps)
        values = token_values(models["value"], stream)
        policy_losses = clipped_policy_loss(logps, old_logps, advantages, clipping.cliprange)
        value_losses = clipped_value_loss(values, old_values, returns, clipping.cliprange_value)
        losses = policy_losses + clipping.vf_coef * value_losses
        (losses.sum() / num_tokens).backward()
        logratios = (logps - old_logps).detach()
        columns = (losses, policy_losses, value_losses,
                   policy_losses > -advantages * logratios.exp(),                # clipped
                   value_losses > 0.5 * (values - returns).square(), 0.5 * logratios.square())
        totals += torch.stack([column.detach().double().sum() for column in columns]) / num_tokens
    return totals


def update(args: argparse.Namespace, models: ModuleDict, optimizer: Optimizer,
           rollouts: list[Rollout], step: int, compute: Compute, ranks: Ranks) -> list[float]:
    """All updates on one batch; returns means over them: [loss, *UPDATE_METRICS, stop signal,
    gradient norm]."""
    parameters, rows = list(trainable(models).values()), []
    clipping = Clipping(args.cliprange, args.cliprange_value, args.vf_coef)
    minibatch_size = math.ceil(len(rollouts) / args.num_mini_batches)
    for epoch in range(args.num_ppo_epochs):
        for numbers in epoch_batches([1] * len(rollouts), minibatch_size, args.seed,
                                     step * args.num_ppo_epochs + epoch):
            minibatch = [rollouts[number] for number in numbers]
            num_tokens = sum(len(rollout.per_token_logps) for rollout in minibatch)
            share = deal(minibatch, ranks.world_size)[ranks.rank]
            totals = minibatch_gradient(models, share, num_tokens, clipping, compute)
            totals = all_reduce_gradients_(
                parameters, torch.cat([totals, totals.new_tensor([ranks.stop.signal])]))
            grad_norm = clip_gradients_(parameters, MAX_GRAD_NORM, totals[0],
                                        f"step {step + 1}, prompts {numbers} of its batch")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append([*totals, grad_norm])
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


# ---- the run ------------------------------------------------------------------------------------

SHOWN = ("objective/scores", "objective/true_reward", "objective/kl", "policy/entropy",
         "policy/clipfrac_avg", "loss/value_avg", "response_length", "ended_by_eos")


@dataclass(frozen=True)
class PPOSetup:
    """A run, ready to start."""
    models: ModuleDict           # "policy" and "value"
    reward_model: Llama
    prompts: list[tuple]         # (prompt ids, {answer: r*} on the world, else None)
    batches: list[list[int]]     # prompt numbers of every step
    tokenizer: Tokenizer
    folder: RunFolder


def train(args: argparse.Namespace, setup: PPOSetup, compute: Compute, ranks: Ranks) -> None:
    """The loop: from the newest checkpoint (or the start) to the last step of the plan."""
    models, batches, eos_ids = setup.models, setup.batches, setup.tokenizer.eos_ids
    sampling = Sampling(args.max_new_tokens, eos_id=eos_ids, unused_ids=setup.tokenizer.unused_ids(
        setup.reward_model.config.vocab_size))
    optimizer = torch.optim.AdamW(trainable(models).values(), lr=args.learning_rate,
                                  weight_decay=0.0, fused=True)
    first, _ = resume(setup.folder, models, optimizer, ranks, len(batches))
    start = time.perf_counter()
    for step in range(first, len(batches)):
        step_start = time.perf_counter()
        lr = learning_rate(step, args.learning_rate, args.warmup_steps, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [setup.prompts[number] for number in batches[step]]
        seeds = row_seeds(derived_seed(args.seed, step), len(batch) * args.num_generations)
        trees = sample_responses(models["policy"], [list(ids) for ids, _ in batch], seeds,
                                 sampling, ranks)
        rollouts = exchange(score_responses(
            models["policy"], models["value"], setup.reward_model, trees, eos_ids,
            args.missing_eos_penalty, compute), ranks.world_size)
        rollouts = add_advantages(rollouts, args.beta, args.gamma, args.lam)
        _, *means, stop_signal, grad_norm = update(args, models, optimizer, rollouts, step, compute,
                                                   ranks)
        if ranks.is_first:
            now, tokens = time.perf_counter(), sum(rollout.num_tokens for rollout in rollouts)
            line = {"step": step + 1} | batch_metrics(rollouts, args.beta, eos_ids)
            if all(answers for _, answers in batch):
                line["objective/true_reward"] = sum(
                    sum(true_rewards(rollout, answers, setup.tokenizer))
                    for rollout, (_, answers) in zip(rollouts, batch)) / len(seeds)
            line |= dict(zip(UPDATE_METRICS, means))
            line |= {"grad_norm": grad_norm, "lr": lr, "tokens": tokens,
                     "tokens_per_s": round(tokens / (now - step_start), 1)}
            write_metrics(args.output_dir, line)
            shown = "  ".join(f"{name} {line[name]:.4g}" for name in SHOWN if name in line)
            print(f"step {step + 1}/{len(batches)}  {shown}  {line['tokens_per_s']:.0f} tok/s  "
                  f"{time_left(now - start, step + 1 - first, len(batches) - first)}", flush=True)
        save_or_stop(setup.folder, step + 1, len(batches), models, optimizer, ranks, stop_signal)


FIXED = ("model_name_or_path", "sft_adapter", "bf16", "lora_r", "lora_alpha",
         "lora_target_modules")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked; where they are not given, some are those of the reward model's run."""
    parser = build_parser(__doc__)
    args = parser.parse_args(argv)
    run = read_run(args.reward_model)
    if not is_reward_model(run):
        raise ValueError(f"--reward_model {args.reward_model} is a run of {run['method']}; "
                         "expected one of train.py --method …reward_model")
    defaults = {name: run[name] for name in INHERITED}
    if on_world(run, args.dataset):
        defaults |= WORLD_FLAGS
    parser.set_defaults(**defaults)                      # the flags that were given still win
    args = parser.parse_args(argv)
    vars(args).update({name: run.get(name) for name in FIXED},
                      method=run["method"].replace("reward_model", "rlhf"),
                      chat_template=trained_template(os.path.join(args.reward_model, "final")))
    args.max_length = args.max_prompt_length + args.max_new_tokens
    args.output_dir = os.path.normpath(args.output_dir.replace("METHOD", args.method))
    check_flags(args)
    return args


def tokenize_prompts(args: argparse.Namespace, tokenizer: Tokenizer, ranks: Ranks) -> list[tuple]:
    """(prompt ids, {answer: r*} on the world, else None) of every distinct training prompt."""
    counts, rewards = Counter(), world_rewards()
    records = read_prompts(args.dataset, counts)
    if ranks.is_first:
        print(describe_data(args.dataset, records, counts))
    found, training = [], split_by_prompt(records, args.held_out)[0]
    for prompt in dict.fromkeys(record.prompt for record in training):
        prompt_ids, _ = truncate(encode_prompt(tokenizer, prompt), [], args.max_length,
                                 args.max_prompt_length)
        found.append((array("i", prompt_ids), rewards.get(prompt)))      # 4 bytes an id
    if not found:
        raise ValueError(f"--held_out {args.held_out} leaves no prompt of {args.dataset}")
    return found


def set_up(args: argparse.Namespace, ranks: Ranks) -> PPOSetup:
    """Read and check everything before anything is written.

    raises  ValueError or OSError, one sentence, for whatever does not fit
    """
    tokenizer = Tokenizer(args.model_name_or_path, chat_template=args.chat_template)
    if ranks.is_first:
        tokenizer.print_notes()
    prompts = tokenize_prompts(args, tokenizer, ranks)
    batches = plan_batches([1] * len(prompts), args.batch_size, args.num_train_epochs,
                           args.max_steps, args.seed)
    if not batches:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs} gives no step")
    reward_model = load_run(args.reward_model).model.requires_grad_(False)
    if args.max_length > (positions := reward_model.config.max_positions):
        raise ValueError(f"--max_prompt_length {args.max_prompt_length} and --max_new_tokens "
                         f"{args.max_new_tokens} exceed the model's {positions} positions")
    torch.manual_seed(args.seed)
    policy = add_lora(share_base(reward_model), args.lora_r, args.lora_alpha, 0.0,
                      args.lora_target_modules)
    value = load_adapter(add_score_head(share_base(reward_model)),
                         os.path.join(args.reward_model, "final"))
    if ranks.is_first:
        print(f"{len(prompts)} distinct prompts; weights trained: "
              f"{sum(p.numel() for p in trainable(policy).values()):,} of the policy, "
              f"{sum(p.numel() for p in trainable(value).values()):,} of the value function")
    return PPOSetup(ModuleDict({"policy": policy, "value": value}), reward_model, prompts, batches,
                 tokenizer, RunFolder(args.output_dir, base_name(args), args.save_steps))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with running() as (ranks, device):
        inputs = args.sft_adapter, os.path.join(args.reward_model, "final")
        flags = run_flags(args, inputs, ranks, device)
        log_probs = choose_linear_logps("auto", device.type)         # refused before anything else
        with own_output_dir(args.output_dir, flags, ranks):
            setup = set_up(args, ranks)
            compute = Compute(device, args.micro_tokens, log_probs,
                              attention_for(setup.models["policy"]))
            # nothing is sampled yet: every prompt answers itself
            trees = [Tree(list(ids), [list(ids)], [0.0], [])
                     for ids, _ in setup.prompts[:args.batch_size]]
            flags |= checked(setup.models["policy"], trees, compute, ranks.is_first)
            if ranks.is_first:
                claim_output_dir(args.output_dir, flags)
            ranks.barrier()
            with ranks.stop:
                train(args, setup, compute, ranks)
            if ranks.is_first:
                save_final(setup.folder, setup.models["policy"], setup.tokenizer)


if __name__ == "__main__":
    run_cli(main)
