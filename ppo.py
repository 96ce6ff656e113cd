"""RLHF by PPO: maximise E[r_phi(x, y)] - beta KL(pi || pi_ref) (ULMA paper, Eq. 3).

    python train.py --method reward_model --num_train_epochs 6 --output_dir runs/reward_model
    python ppo.py --reward_model runs/reward_model                    RLHF, on the embedded world
    python ppo.py --reward_model runs/pointwise_reward_model          point-wise RLHF
    torchrun --standalone --nproc_per_node=8 ppo.py --reward_model runs/hh-reward --batch_size 512
    python eval.py runs/rlhf runs/pointwise_rlhf

A step: the policy answers a batch of prompts, each rank its share, num_generations answers a
prompt, which share its tokens; one pass without gradients gives
log-probs of policy and reference, values and rewards; ranks exchange what they have, so each knows
the whole batch; then num_ppo_epochs times num_mini_batches clipped updates, each divided by the
tokens of its whole minibatch.

Policy, reference, reward model and value function share one set of frozen weights: the reference is
the policy with its adapter off, the others have adapters of their own. The value function starts as
a copy of the reward model, which already tells how an answer is going.
The base model and the adapter's shape are the reward model's; so are some flags, if not given.
"""
import argparse
import math
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import (claim_output_dir, load_run, read_run, resume, save_checkpoint, save_final,
                        sha256, trainable)
from data import print_counts, read_dataset, run_cli, split_by_prompt
from eval import on_world
from generate import row_seeds
from loop import (Help, Stop, check_ranges, learning_rate, optimizer_step, plan_batches,
                  set_up_processes, write_line)
from lora import add_lora, load_adapter, share_base
from model import Llama
from reward import add_score_head
from rollouts import (Rollout, batch_metrics, exchange, joined, observe, sample, token_values,
                      true_rewards, world_rewards)
from step import token_logps
from tokenizer import Tokenizer, encode_dialogue
from train import base_name
from trees import Tree, build_stream, epoch_batches, pack, shard, truncate


# ---- formulas: N tokens of R responses laid end to end, the tokens of one response together ------

def kl_penalised_rewards(per_token_logps: Tensor, reference_per_token_logps: Tensor,
                         response_ids: Tensor, scores: Tensor, beta: float) -> Tensor:
    """r_t = -beta (log π - log π_ref)(y_t | x, y_<t), and r_φ(x, y) on top at the last token.

    per_token_logps            [N] float   of sampled tokens under the policy, nats
    reference_per_token_logps  [N] float
    response_ids               [N] int64   0 0 0 1 1 …: whose token; every response has one
    scores                     [R] float   r_φ(x, y)
    returns                    [N] float   sums to r_φ - beta (log π - log π_ref)(y | x), Eq. 3
    The difference of log-probs is the k1 estimate of the KL: unbiased, and negative at times.
    """
    rewards = -beta * (per_token_logps - reference_per_token_logps)              # [N]
    last = response_ids.bincount(minlength=len(scores)).cumsum(0) - 1            # [R]
    return rewards.index_add(0, last, scores)


def gae(rewards: Tensor, values: Tensor, response_ids: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = δ_t + γλ A_{t+1},  δ_t = r_t + γ V_{t+1} - V_t; A and V are 0 past the last token.

    rewards, values  [N] float   V_t is the value before token t is known
    response_ids     [N] int64   0 0 0 1 1 …
    returns          [N] float   advantages; A + V are the returns a value function learns
    Source: Generalized Advantage Estimation, arXiv:1506.02438, Eq. 16.
    """
    advantages, later, value_later, owner = [], 0.0, 0.0, None
    for reward, value, response in reversed(list(zip(
            rewards.tolist(), values.tolist(), response_ids.tolist()))):
        if response != owner:
            later, value_later, owner = 0.0, 0.0, response
        later = reward + gamma * value_later - value + gamma * lam * later
        value_later = value
        advantages.append(later)
    return values.new_tensor(advantages[::-1])


def whiten(values: Tensor) -> Tensor:
    """(v - mean) / standard deviation: [N] -> [N]. Of a whole batch, never of one rank's share."""
    return (values - values.mean()) / (values.var() + 1e-8).sqrt()    # 1e-8: all may be equal


def clipped_policy_loss(per_token_logps: Tensor, old_per_token_logps: Tensor, advantages: Tensor,
                        cliprange: float) -> Tensor:
    """max(-A q, -A clip(q, 1 - c, 1 + c)),  q = π(y_t) / π_old(y_t).

    per_token_logps      [N] float   of sampled tokens, now
    old_per_token_logps  [N] float   when they were sampled; constant, as is A
    advantages           [N] float
    returns              [N] float   loss per token
    Source: PPO, arXiv:1707.06347, Eq. 7, with its sign turned.
    """
    ratio = (per_token_logps - old_per_token_logps).exp()                        # [N]
    return torch.maximum(-advantages * ratio,
                         -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor,
                       cliprange_value: float) -> Tensor:
    """max((V - R)², (clip(V, V_old - c, V_old + c) - R)²) / 2: [N] each -> [N].

    Source: TRL's PPO (trl/experimental/ppo, removed before 1.16).
    """
    near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)     # [N]
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


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


def backward_minibatch(policy: Llama, value: Llama, rollouts: list[Rollout], num_tokens: int, *,
                       cliprange: float, cliprange_value: float, vf_coef: float,
                       micro_tokens: int, device="cpu") -> Tensor:
    """Accumulate the gradient of this rank's share of a minibatch; returns [loss, *UPDATE_METRICS].

    num_tokens   of the responses of the whole minibatch: what the loss is divided by
    """
    totals = torch.zeros(1 + len(UPDATE_METRICS), dtype=torch.float64, device=device)
    for group in pack(rollouts, micro_tokens):
        stream = build_stream(group, device)
        old_logps, advantages, old_values, returns = (
            joined(group, name, device)
            for name in ("per_token_logps", "advantages", "values", "returns"))
        logps, _ = token_logps(policy, None, stream, None)                       # [N]
        values = token_values(value, stream)                                     # [N]
        policy_losses = clipped_policy_loss(logps, old_logps, advantages, cliprange)
        value_losses = clipped_value_loss(values, old_values, returns, cliprange_value)
        losses = policy_losses + vf_coef * value_losses                          # [N]
        (losses.sum() / num_tokens).backward()
        logratios = (logps - old_logps).detach()
        columns = (losses, policy_losses, value_losses,
                   policy_losses > -advantages * logratios.exp(),                # a clip counted
                   value_losses > 0.5 * (values - returns).square(), 0.5 * logratios.square())
        totals += torch.stack([column.detach().double().sum() for column in columns]) / num_tokens
    return totals


def update(args, models, optimizer, rollouts: list[Rollout], step: int, rank: int, world_size: int,
           device, stop: Stop) -> tuple[Tensor, float]:
    """All updates on one batch; returns means over them: [loss, *UPDATE_METRICS, stop signal], and
    the gradient norm."""
    parameters, rows = list(trainable(models).values()), []
    size = math.ceil(len(rollouts) / args.num_mini_batches)
    for epoch in range(args.num_ppo_epochs):
        for numbers in epoch_batches([1] * len(rollouts), size, args.seed,
                                     step * args.num_ppo_epochs + epoch):
            minibatch = [rollouts[number] for number in numbers]
            totals = backward_minibatch(
                models["policy"], models["value"], shard(minibatch, world_size)[rank],
                sum(len(rollout.per_token_logps) for rollout in minibatch),
                cliprange=args.cliprange, cliprange_value=args.cliprange_value,
                vf_coef=args.vf_coef, micro_tokens=args.micro_tokens, device=device)
            extras = torch.cat([totals, totals.new_tensor([stop.signal])])
            extras, grad_norm = optimizer_step(optimizer, parameters, extras, args.max_grad_norm,
                                               f"step {step + 1}, prompts {numbers} of its batch")
            rows.append([*extras, grad_norm])
    *means, grad_norm = torch.tensor(rows, dtype=torch.float64).mean(0)
    return torch.stack(means), float(grad_norm)


# ---- the run ------------------------------------------------------------------------------------

SHOWN = ("objective/scores", "objective/true_reward", "objective/kl", "policy/entropy",
         "policy/clipfrac_avg", "loss/value_avg", "response_length", "ended_by_eos")


def train(args, models, reward_model: Llama, asked: list, batches: list[list[int]],
          tokenizer: Tokenizer, rank: int, world_size: int, device, stop: Stop) -> None:
    """The loop: from the newest checkpoint (or the start) to the last step of the plan.

    asked   [(prompt ids, {answer: r*} or None)]
    """
    optimizer = torch.optim.AdamW(trainable(models).values(), lr=args.learning_rate,
                                  weight_decay=0.0, fused=True)
    first = resume(args.output_dir, models, optimizer, rank, len(batches))
    start = time.perf_counter()
    for step in range(first, len(batches)):
        since, lr = time.perf_counter(), learning_rate(step, args.learning_rate, args.warmup_steps,
                                                       len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [asked[index] for index in batches[step]]
        seeds = row_seeds(args.seed * 1_000_003 + step, len(batch) * args.num_generations)
        trees = sample(models["policy"], [ids for ids, _ in batch], seeds, args.max_new_tokens,
                       rank, world_size)
        rollouts = exchange(observe(models["policy"], models["value"], reward_model, trees,
                                    tokenizer.eos_id, args.missing_eos_penalty, args.micro_tokens,
                                    device), world_size)
        rollouts = add_advantages(rollouts, args.beta, args.gamma, args.lam)
        (_, *means, stop_signal), grad_norm = update(args, models, optimizer, rollouts, step, rank,
                                                     world_size, device, stop)
        if rank == 0:
            now, tokens = time.perf_counter(), sum(rollout.num_tokens for rollout in rollouts)
            line = {"step": step + 1} | batch_metrics(rollouts, args.beta, tokenizer.eos_id)
            if all(listed for _, listed in batch):
                line["objective/true_reward"] = sum(
                    sum(true_rewards(rollout, listed, tokenizer))
                    for rollout, (_, listed) in zip(rollouts, batch)) / len(seeds)
            line |= dict(zip(UPDATE_METRICS, map(float, means)))
            line |= {"grad_norm": grad_norm, "lr": lr, "tokens": tokens,
                     "tokens_per_s": round(tokens / (now - since), 1)}
            write_line(args.output_dir, line, SHOWN, len(batches),
                       (now - start) / (step + 1 - first) * (len(batches) - step - 1))
        done = step + 1 == len(batches)
        if rank == 0 and not done and (stop_signal or (step + 1) % args.save_steps == 0):
            save_checkpoint(args.output_dir, step + 1, models, optimizer, args.model_name_or_path,
                            args.save_total_limit)
        if stop_signal and not done:
            if rank == 0:
                print(f"stopped after step {step + 1}, saved; the same command continues")
            sys.exit(128 + (stop.signal or signal.SIGTERM))


# On the embedded world, as train.py's: a small model takes large steps. 1e-2 is too large: the
# policy left the world, at a true reward of -5.5. The objective stops rising after some 30 steps.
WORLD_FLAGS = {"learning_rate": 1e-3, "warmup_steps": 5, "batch_size": 19, "num_generations": 4,
               "num_ppo_epochs": 2, "max_new_tokens": 48, "max_steps": 40}
INHERITED = ("beta", "dataset", "held_out", "max_prompt_length")
FIXED = ("model_name_or_path", "sft_adapter", "bf16", "lora_r", "lora_alpha",
         "lora_target_modules")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, epilog=(
        "defaults on the embedded world: " + ", ".join(f"{k} {v}" for k, v in WORLD_FLAGS.items())))
    flag = parser.add_argument_group("what").add_argument
    flag("--reward_model", required=True,
         help="finished run of train.py --method …reward_model; its flags are the defaults of "
              + ", ".join(INHERITED))
    flag("--dataset", help="prompts: any file train.py reads")
    flag("--held_out", type=float, help="fraction of prompts never asked")
    flag("--output_dir", default="runs/METHOD", help="METHOD stands for rlhf or pointwise_rlhf")
    flag("--overwrite_output_dir", action="store_true", help="delete the run in output_dir first")
    flag = parser.add_argument_group("objective").add_argument
    flag("--beta", type=float, help="KL strength, TRL's kl_coef")
    flag("--missing_eos_penalty", type=float, default=1.0,
         help="taken off the reward of a response that was cut at max_new_tokens, nats")
    flag("--gamma", type=float, default=1.0, help="discount per token")
    flag("--lam", type=float, default=0.95, help="lambda of the advantages")
    flag("--cliprange", type=float, default=0.2, help="of the policy's ratio")
    flag("--cliprange_value", type=float, default=0.2, help="of the value, nats")
    flag("--vf_coef", type=float, default=0.1, help="weight of the value loss")
    flag = parser.add_argument_group("optimization").add_argument
    flag("--learning_rate", type=float, default=1e-5, help="peak; then a cosine to 0")
    flag("--batch_size", type=int, default=64, help="prompts per step over all ranks")
    flag("--num_generations", type=int, default=1, help="responses sampled to each prompt")
    flag("--num_ppo_epochs", type=int, default=4, help="passes over a batch")
    flag("--num_mini_batches", type=int, default=1, help="updates per pass")
    flag("--num_train_epochs", type=float, default=1.0, help="passes over the prompts")
    flag("--max_steps", type=int, default=-1, help="overrides epochs if > 0")
    flag("--warmup_steps", type=int, default=0, help="linear warm-up")
    flag("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    flag("--seed", type=int, default=42, help="of order, sampling and initialisation")
    flag = parser.add_argument_group("size, saving").add_argument
    flag("--max_prompt_length", type=int, help="longer prompts lose their left end")
    flag("--max_new_tokens", type=int, default=128, help="a response ends here, or after EOS")
    flag("--micro_tokens", type=int, default=8192, help="tokens per forward pass and rank")
    flag("--save_steps", type=int, default=20, help="steps per checkpoint")
    flag("--save_total_limit", type=int, default=2, help="checkpoints kept, the newest")
    args = parser.parse_args(argv)
    run = read_run(args.reward_model)
    if not run["method"].endswith("reward_model"):
        raise ValueError(f"--reward_model {args.reward_model} is a run of {run['method']}; "
                         "expected one of train.py --method …reward_model")
    defaults = {name: run[name] for name in INHERITED}
    if on_world(run, args.dataset):
        defaults |= WORLD_FLAGS
    parser.set_defaults(**defaults)                      # the flags that were given still win
    args = parser.parse_args(argv)
    vars(args).update({name: run.get(name) for name in FIXED},
                      method=run["method"].replace("reward_model", "rlhf"))
    args.max_length = args.max_prompt_length + args.max_new_tokens
    args.output_dir = os.path.normpath(args.output_dir.replace("METHOD", args.method))
    check_flags(args)
    return args


def check_flags(args) -> None:
    """Raise ValueError, naming the flag, for values that no run can mean."""
    check_ranges(args, (
        "batch_size", "micro_tokens", "save_steps", "save_total_limit", "num_ppo_epochs",
        "num_mini_batches", "num_generations", "max_new_tokens"), {
        "held_out": (0, 1), "gamma": (0, 1), "lam": (0, 1), "cliprange": (0, 1)} | {
        name: (0, math.inf) for name in (
            "beta", "learning_rate", "warmup_steps", "num_train_epochs", "vf_coef",
            "max_grad_norm", "cliprange_value", "missing_eos_penalty")})
    if args.max_prompt_length < 2:
        raise ValueError(f"--max_prompt_length {args.max_prompt_length} must be at least 2")


def prepare(args, rank: int):
    """Read and check everything before anything is written.

    returns (models, reward_model, asked, batches, tokenizer)

    raises  ValueError or OSError, one sentence, for whatever does not fit
    """
    counts, tokenizer, listed = Counter(), Tokenizer(args.model_name_or_path), world_rewards()
    records = read_dataset(args.dataset, counts)
    if rank == 0:
        print_counts(args.dataset, records, counts)
    asked = []
    for prompt in dict.fromkeys(
            record.prompt for record in split_by_prompt(records, args.held_out)[0]):
        prompt_ids, _ = encode_dialogue(tokenizer, [*prompt, ("Assistant", "")])
        prompt_ids, _ = truncate(prompt_ids, [], args.max_length, args.max_prompt_length)
        asked.append((prompt_ids, listed.get(prompt)))
    if not asked:
        raise ValueError(f"--held_out {args.held_out} leaves no prompt of {args.dataset}")
    batches = plan_batches([Tree(ids, [[]], [0.0], []) for ids, _ in asked], "all",
                           args.batch_size, args.num_train_epochs, args.max_steps, args.seed)
    if not batches:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs} gives no step")
    reward_model = load_run(args.reward_model)[0].requires_grad_(False)
    if args.max_length > (positions := reward_model.config.max_positions):
        raise ValueError(f"--max_prompt_length {args.max_prompt_length} and --max_new_tokens "
                         f"{args.max_new_tokens} exceed the model's {positions} positions")
    torch.manual_seed(args.seed)
    policy = add_lora(share_base(reward_model), args.lora_r, args.lora_alpha, 0.0,
                      args.lora_target_modules)
    value = load_adapter(add_score_head(share_base(reward_model)),
                         os.path.join(args.reward_model, "final"))
    models = torch.nn.ModuleDict({"policy": policy, "value": value})
    if rank == 0:
        print(f"{len(asked)} distinct prompts; weights trained: "
              f"{sum(p.numel() for p in trainable(policy).values()):,} of the policy, "
              f"{sum(p.numel() for p in trainable(value).values()):,} of the value function")
    return models, reward_model, asked, batches, tokenizer


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_flush_denormal(True)                       # see train.py
    rank, world_size, device = set_up_processes()
    models, reward_model, asked, batches, tokenizer = prepare(args, rank)
    weights = os.path.join(args.reward_model, "final", "adapter_model.safetensors")
    if rank == 0:
        claim_output_dir(args.output_dir, vars(args) | {
            "dataset_sha256": sha256(args.dataset), "reward_model_sha256": sha256(weights)},
            args.overwrite_output_dir)
    if world_size > 1:
        dist.barrier()
    train(args, models, reward_model, asked, batches, tokenizer, rank, world_size, device, Stop())
    if rank == 0:
        save_final(args.output_dir, models["policy"], base_name(args), tokenizer)
    if world_size > 1:
        dist.barrier()                                   # see train.py
        dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
