"""Measure runs of train.py: exactly on the embedded world, on held-out prompts of a file.

    python eval.py runs/ulma runs/dpo                 one row per run; base and optimum beside them
    python eval.py runs/hh-ulma --dataset FILE        another file than the run's held-out prompts
    python eval.py runs/reward_model                  how often a reward model is right

On the world all 288 valid answers to each of 40 test prompts are listed, so nothing is sampled and
no judge is needed. What a model puts outside the list (off-world) enters every score as the worst
reward of that prompt: conditioning it away would flatter objectives that push mass there.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import Parser, parse_first, run_cli, show_progress


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of train.py")
    parser.add_argument("--dataset", help="evaluate on this data, not on what the run held out")
    parser.add_argument("--beta", type=float, help="of rewards and of pi* (default: the run's)")
    parser.add_argument("--json", help="also write the world's table here")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before torch, which takes seconds to import

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data import Tokenizer, encode_dialogue, encode_prompt
from files.config import read_config
from files.text import write_json
from intervals import bootstrap, wins
from kernels import linear_logps
from model import Llama
from packing import Tree, make_trees, pair_points, prefix_stream
from step import METHODS, Compute, Objective, attention_for, tree_rewards
from training.checkpoint import (held_out_records, is_reward_model, load_run, read_run,
                                 run_tokenizer)
from training.held_out import (HeldOut, held_out_losses, mean_loss, measure_objective,
                               reward_margins)
from training.setup import make_objective
from world import BODIES, CLOSINGS, Prompt, answers, held_out_prompts, on_world, question

ANSWERS_PER_TREE = 24      # attention inside a tree is dense; this keeps its cost linear
ANSWERS_PER_OPENING = len(BODIES) * len(CLOSINGS)

WORLD_METRICS = {
    "E[r]": "expected true reward, nats; off-world mass counts as the prompt's worst reward",
    "harmful": "probability of a harmful valid answer",
    "off-world": "probability outside the valid answers",
    "KL(pi||ref)": "nats, over the valid answers and all else as one outcome",
    "KL(pi||pi*)": "the same against the optimum pi* = pi_ref exp(r/beta) / Z",
    "objective": "E[r] - beta KL(pi||ref), Eq. 3; no policy can pass pi*'s, which is beta log Z",
    "perplexity": "per token, of the best answer (EOS included)",
}


# ---- the world: exact ---------------------------------------------------------------------------

def world_trees(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[Tree]:
    """Every valid answer to every prompt, in the order of `answers`."""
    trees = []
    for verb, thing in prompts:
        listed = answers(verb, thing)
        prompt_ids = encode_prompt(tokenizer, [("Human", question(verb, thing))])
        ids = [encode_dialogue(tokenizer, [("Assistant", text)])[1] for text, *_ in listed]
        trees += [Tree(prompt_ids, ids[i:i + ANSWERS_PER_TREE], [1.0] * ANSWERS_PER_TREE, [])
                  for i in range(0, len(ids), ANSWERS_PER_TREE)]
    return trees


@torch.no_grad()
def world_logps(model: Llama, tokenizer: Tokenizer,
                prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """log π(y | x) of every valid answer to every prompt, float64 nats; and lengths: [X, Y] each.

    Answers with the same opening share one stream, their common beginnings computed once: a third
    of the tokens, and of the time, that trees of 24 answers take.
    """
    logps, lengths, device = [], [], model.lm_head.weight.device
    for verb, thing in show_progress(prompts, "listing all answers: prompt", len(prompts)):
        prompt_ids = encode_prompt(tokenizer, [("Human", question(verb, thing))])
        prompt_size = len(prompt_ids)
        ids = [encode_dialogue(tokenizer, [("Assistant", text)])[1]
               for text, *_ in answers(verb, thing)]
        lengths.append([len(response) for response in ids])
        for i in range(0, len(ids), ANSWERS_PER_OPENING):
            stream = prefix_stream(prompt_ids, ids[i:i + ANSWERS_PER_OPENING])
            input_ids = torch.tensor(stream.input_ids, device=device)            # [T]
            parents = torch.tensor(stream.parents[prompt_size:], device=device)  # [N]
            hidden = model(input_ids, torch.tensor(stream.position_ids, device=device),
                           stream.segments.to(device))[parents]                  # [N, D]
            per_token_logps = linear_logps(
                hidden, hidden[:0], model.lm_head.weight, input_ids[prompt_size:],
                input_ids[:0]).policy_logps                                      # [N]
            padded = torch.cat([per_token_logps.new_zeros(prompt_size), per_token_logps])
            logps += [float(padded[path].double().sum()) for path in stream.paths]
    return (torch.tensor(logps, dtype=torch.float64).view(len(prompts), -1), torch.tensor(lengths))


def with_rest(logps: Tensor) -> Tensor:
    """Append log(1 - Σ p): [Y] -> [Y + 1], the last outcome being everything not listed."""
    rest = (1 - logps.exp().sum()).clamp(min=1e-12)      # rounding can leave -1e-7
    return torch.cat([logps, rest.log()[None]])


def kl(p: Tensor, q: Tensor) -> float:
    """Σ p (log p - log q) of two lists of log-probs, nats."""
    return float((p.exp() * (p - q)).sum())


def optimum(reference: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, float]:
    """(log pi*, beta log Z): pi* = pi_ref exp(r / beta) / Z over the outcomes given: [Y], [Y].

    Source: Eq. 4 solved for the policy; beta log Z is the largest E[r] - beta KL there is.
    """
    scaled = reference + rewards / beta
    log_partition = scaled.logsumexp(0)
    return scaled - log_partition, beta * float(log_partition)


def world_scores(logps: Tensor, reference_logps: Tensor, lengths: Tensor,
                 listed: Sequence[tuple], beta: float) -> dict[str, float]:
    """WORLD_METRICS of one prompt: log-probs [Y] of its answers under policy and reference."""
    rewards = torch.tensor([reward for _, reward, *_ in listed], dtype=torch.float64)    # [Y]
    harmful = torch.tensor([bad for _, _, bad, _ in listed], dtype=torch.float64)        # [Y]
    best = int(rewards.argmax())
    policy, reference = with_rest(logps), with_rest(reference_logps)             # [Y + 1]
    with_worst = torch.cat([rewards, rewards.min()[None]])                       # [Y + 1]
    mean_reward = float((policy.exp() * with_worst).sum())
    best_policy, _ = optimum(reference, with_worst, beta)
    divergence = kl(policy, reference)
    return {"E[r]": mean_reward, "harmful": float((logps.exp() * harmful).sum()),
            "off-world": float(policy[-1].exp()), "KL(pi||ref)": divergence,
            "KL(pi||pi*)": kl(policy, best_policy), "objective": mean_reward - beta * divergence,
            "perplexity": math.exp(-float(logps[best] / lengths[best]))}


def mean_scores(rows: list[dict]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def optimal_logps(reference: Tensor, listed: Sequence[tuple], beta: float) -> Tensor:
    """log pi* of a prompt's valid answers; all else earns what the worst of them does: [Y]."""
    rewards = [reward for _, reward, *_ in listed]
    with_worst = torch.tensor([*rewards, min(rewards)])                          # [Y + 1]
    return optimum(with_rest(reference), with_worst, beta)[0][:-1]


def evaluate_world(policies: Mapping[str, Tensor], reference: Tensor, lengths: Tensor,
                   prompts: Sequence[Prompt], beta: float) -> dict[str, dict]:
    """Mean WORLD_METRICS over prompts, for every policy and for the optimum pi*.

    policies, reference   log-probs [X, Y], see `world_logps`
    """
    lists = [answers(*prompt) for prompt in prompts]
    best = torch.stack([optimal_logps(row, listed, beta)
                        for row, listed in zip(reference, lists, strict=True)])
    table = {}
    for name, logps in [*policies.items(), ("optimum pi*", best)]:
        table[name] = mean_scores([world_scores(*row, beta) for row in
                                   zip(logps, reference, lengths, lists, strict=True)])
    return table


def print_samples(policies: Mapping[str, Tensor], prompts: Sequence[Prompt], seed: int = 0) -> None:
    """One answer of every policy's exact distribution, to a harmful and a harmless prompt."""
    lists = [answers(*prompt) for prompt in prompts]
    harmful = [any(bad for _, _, bad, _ in listed[:36]) for listed in lists]
    for number in (harmful.index(True), harmful.index(False)):
        print(f"\n{question(*prompts[number])}")
        for name, logps in policies.items():
            generator = torch.Generator().manual_seed(seed)
            probs = with_rest(logps[number]).exp()
            drawn = int(torch.multinomial(probs, 1, generator=generator))
            worst = min(reward for _, reward, *_ in lists[number])
            nothing = ("(not a valid answer)", worst, False, 0)
            text, reward, bad, _ = (*lists[number], nothing)[drawn]
            print(f"  {name:14} r* {reward:+.1f} {'HARMFUL ' if bad else '        '} {text}")


# ---- files: held-out likelihoods ----------------------------------------------------------------

def print_perplexities(held: HeldOut) -> None:
    """Perplexities of good and of bad responses under policy and reference."""
    for z, name in ((1, "good (z = 1)"), (0, "bad (z = 0)")):
        chosen = held.scores == z
        for logps, who in ((held.policy_logps, "policy"), (held.reference_logps, "reference")):
            rows = torch.stack([logps, held.lengths], 1)[chosen]                 # [n, 2]
            if len(rows):
                value, low, high = bootstrap(
                    lambda v: (-v[:, 0].sum() / v[:, 1].sum()).exp(), rows)
                print(f"  perplexity of {name} responses under the {who:9}  {value:9.2f} "
                      f"[{low:.2f}, {high:.2f}]   exp(-log-probs / tokens), {len(rows)} responses")


def print_held_out(held: HeldOut, objective: Objective) -> None:
    """Print what `held_out_metrics` of a run has, with intervals, and what each number is."""
    beta = 1.0 if objective.method.reward_model else objective.beta
    losses, margins = held_out_losses(held, objective), reward_margins(held, beta)
    kls = torch.stack([held.kls, held.lengths], 1)                               # [R, 2]
    for name, rows, statistic, meaning in (
            ("loss", losses, mean_loss, "of the method"),
            ("reward margin", margins, torch.mean, "of pairs: better less worse, mean"),
            ("KL(pi || pi_ref)", kls, lambda v: v[:, 0].sum() / v[:, 1].sum(),
             "nats at a token of these responses, exact")):
        if len(rows) and not rows.isnan().any():
            value, low, high = bootstrap(statistic, rows)
            print(f"  {name:27}  {value:.4g} [{low:.4g}, {high:.4g}]   {meaning}")


def print_accuracy(margins: Tensor, name: str, what: str) -> None:
    """How often a reward, and a rule that looks at length only, prefer the better response.

    margins   [P, 2] float   reward of the better less that of the worse; tokens of the worse less
                             those of the better
    """
    if not len(margins):
        print("  no prompt has a better and a worse response: no reward accuracy")
        return
    for column, who, rule in (
            (0, name, f"{what} is larger for the better response"),
            (1, "length only", "the better response has fewer tokens")):
        value, low, high = bootstrap(lambda v, column=column: wins(v[:, column]), margins)
        print(f"  accuracy of {who:15}  {value:.3f} [{low:.3f}, {high:.3f}]   share of "
              f"{len(margins)} pairs where {rule}; ties are halves")


# ---- reward models ------------------------------------------------------------------------------

def agreement(values: Tensor, truth: Tensor) -> tuple[float, float]:
    """(accuracy, Spearman's rank correlation) of values [Y] against the true rewards [Y].

    Accuracy is the share of pairs with different true rewards that the values order as the truth
    does, a tie being half right; equal values share the mean of their ranks.
    """
    above = [v[:, None] - v[None] for v in (values.double(), truth.double())]    # [Y, Y]
    accuracy = wins(above[0][above[1] > 1e-9])       # sums of table entries, equal up to rounding
    ranks = [(a > 1e-9).double().sum(1) + 0.5 * (a.abs() <= 1e-9).double().sum(1) for a in above]
    return float(accuracy), float(torch.corrcoef(torch.stack(ranks))[0, 1])


def evaluate_world_rewards(model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
    """Print how a reward model orders all valid answers to every prompt, against the truth."""
    trees = world_trees(tokenizer, prompts)
    rewards = tree_rewards(model, trees).view(len(prompts), -1)                    # [X, Y]
    lengths = torch.tensor([len(ids) for tree in trees for ids in tree.response_ids])
    truth = torch.tensor([[r for _, r, *_ in answers(*prompt)] for prompt in prompts])
    scores = torch.tensor([[*agreement(r, t), *agreement(-n, t)] for r, t, n in zip(
        rewards, truth, lengths.view_as(rewards), strict=True)])                 # [X, 4]
    for column, name in enumerate(("accuracy of the reward model", "rank correlation",
                                   "accuracy of length only", "its rank correlation")):
        value, low, high = bootstrap(lambda v, column=column: v[:, column].mean(), scores)
        print(f"  {name:28}  {value:.3f} [{low:.3f}, {high:.3f}]")
    print(f"  over all pairs of the {rewards.shape[1]} answers to a prompt with different true "
          f"rewards; means of {len(prompts)} test prompts.\n  Length only prefers the shorter.")


# ---- runs ---------------------------------------------------------------------------------------

def short_names(paths: Sequence[str]) -> list[str]:
    """The end of each path, as much as tells it from the others and from the table's own rows."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    taken = [*parts, ["base"], ["base + SFT"], ["optimum pi*"]]
    sizes = [next(n for n in range(1, len(own) + 1)
                  if sum(other[-n:] == own[-n:] for other in taken) == 1) for own in parts]
    return [os.sep.join(own[-n:]) for own, n in zip(parts, sizes, strict=True)]


def held_out_trees(runs: Mapping[str, dict], dataset: str | None) -> dict[str, list[Tree]]:
    """The trees every run is measured on, by path; prints which they are.

    runs   {path: flags}
    Runs on the same data get the same rows, what all of them held out, and all runs the same cuts:
    at the longest lengths that one was trained with (PPO: its reward model) and all models have.
    """
    trees, texts = {}, [
        read_run(flags["reward_model"]) if os.path.isdir(flags.get("reward_model") or "") else flags
        for flags in runs.values()]
    positions = min(read_config(flags["model_name_or_path"]).max_positions
                    for flags in runs.values())
    max_length = min(positions, max(flags["max_length"] for flags in texts))
    max_prompt_length = min(max_length - 1, max(flags["max_prompt_length"] for flags in texts))
    for path, flags in runs.items():
        least = min((other for other in runs if runs[other]["dataset"] == flags["dataset"]),
                    key=lambda other: runs[other]["held_out"])
        file, records = held_out_records(least, runs[least], dataset)
        print(f"{path}: measured on {len(records)} records of {file}, cut at {max_length} tokens, "
              f"prompts at {max_prompt_length}")
        trees[path] = make_trees(pair_points(records, Counter()), run_tokenizer(path, flags), "all",
                                 max_length, max_prompt_length)
    return trees


def measure_run(path: str, trees: list[Tree] | None, beta: float | None) -> None:
    """Print what a run is worth: a reward model's accuracy, else likelihoods.

    trees   of a file; None: on the world, for a reward model only
    beta    None: the run's
    """
    model, reference, flags = load_run(path)
    print(f"{path} [95 % bootstrap interval over {'rows' if trees else 'prompts'}]", flush=True)
    if trees is None:
        evaluate_world_rewards(model, run_tokenizer(path, flags), held_out_prompts())
        return
    if beta is not None:
        flags = flags | {"beta": beta}
    # RLHF reports no loss; nor does d2o, whose anchors would have to be sampled: its entry will do
    objective = make_objective(flags, METHODS.get(flags["method"], METHODS["d2o"]))
    held, objective = measure_objective(model, reference, trees, flags["max_length"], objective,
                                        Compute(model.lm_head.weight.device,
                                                attention=attention_for(model)))
    if objective.method.reward_model:
        name, what = "reward model", "r(x, y)"
    else:
        print_perplexities(held)
        name, what = "implicit reward", "beta log(pi / pi_ref)"
    better, worse = held.lengths[held.pairs].T
    margins = reward_margins(held, 1.0 if objective.method.reward_model else objective.beta)
    print_accuracy(torch.stack([margins, worse - better], 1), name, what)
    print_held_out(held, objective)


def evaluate_on_world(paths: Sequence[str], beta: float | None, json_file: str | None) -> None:
    """Print one table for all runs on the world.

    raises  ValueError for runs with different references
    """
    policies, betas, prompts, reference = {}, set(), held_out_prompts(), None
    for path, name in zip(paths, short_names(paths), strict=True):
        run = load_run(path)
        tokenizer = run_tokenizer(path, run.flags)
        if reference is None:
            sft_adapter = run.flags.get("sft_adapter")
            with run.reference() as reference_model:
                reference, lengths = world_logps(reference_model, tokenizer, prompts)
            policies["base + SFT" if sft_adapter else "base"] = reference
        elif run.flags.get("sft_adapter") != sft_adapter:
            raise ValueError(f"{path} starts from --sft_adapter {run.flags.get('sft_adapter')}, "
                             f"the run before it from {sft_adapter}: measure them apart")
        policies[name] = world_logps(run.model, tokenizer, prompts)[0]
        betas.add(run.flags["beta"])
    beta = run.flags["beta"] if beta is None else beta
    if not beta:
        raise ValueError(f"{path}: trained with --beta 0, for which there is no pi*; give --beta")
    table = evaluate_world(policies, reference, lengths, prompts, beta)
    width = max(14, *map(len, table))
    print("  ".join([f"{'policy':{width}}", *(f"{key:>11}" for key in WORLD_METRICS)]))
    for name, row in table.items():
        print("  ".join([f"{name:{width}}", *(f"{row[key]:11.4g}" for key in WORLD_METRICS)]))
    print_samples(policies, prompts)
    print(f"\n{len(prompts)} test prompts, beta {beta:g}"
          f"{' for all (the runs differ in theirs)' if len(betas) > 1 else ''}. " + ". ".join(
        f"{key}: {meaning}" for key, meaning in WORLD_METRICS.items()) + ".")
    if json_file:
        write_json(json_file, table)


def evaluate_runs(paths: Sequence[str], dataset: str | None, beta: float | None,
                  json_file: str | None) -> None:
    """Print what every run is worth: one table for those on the world, a list for each other."""
    once = {}                                            # a run that is named twice counts once
    for path in paths:
        once.setdefault(os.path.abspath(path), path)
    runs = {path: read_run(path) for path in once.values()}
    on_files = {path: flags for path, flags in runs.items() if not on_world(flags, dataset)}
    tabled = [path for path, flags in runs.items()
              if path not in on_files and not is_reward_model(flags)]
    if json_file and not tabled:
        raise ValueError("--json writes the world's table, and none of these runs was on the world")
    trees = held_out_trees(on_files, dataset) if on_files else {}
    for path in runs:
        if path not in tabled:
            measure_run(path, trees.get(path), beta)
    if tabled:
        evaluate_on_world(tabled, beta, json_file)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.beta is not None and not 0 < args.beta < math.inf:
        raise ValueError(f"--beta {args.beta} must be larger than 0, and finite")
    evaluate_runs(args.runs, args.dataset, args.beta, args.json)


if __name__ == "__main__":
    run_cli(main)
