"""Measure runs of train.py: exactly on the embedded world, on held-out prompts of a file.

    python eval.py runs/ulma runs/dpo                 one row per run; base and optimum beside them
    python eval.py runs/hh-ulma --dataset FILE        another file than the run's held-out prompts
    python eval.py runs/reward_model                  how often a reward model is right
    python eval.py --heatmap runs/ulma --html h.html  the tokens a run likes more than its reference
    python eval.py judge --help                       win, tie, lose by a judge or a reward model

On the world all 288 valid answers to each of 40 test prompts are listed, so nothing is sampled and
no judge is asked. What a model puts outside the list (off-world) enters every score as the worst
reward of that prompt: conditioning it away would flatter objectives that push mass there.
"""
import argparse
import json
import math
import os
import sys

import torch
from torch import Tensor

import judge
from checkpoint import load_run, read_run, write_text
from data import Record, Tokenizer, encode_dialogue, read_dataset, run_cli, split_by_prompt
from heatmap import page, print_responses, responses_of
from intervals import bootstrap, wins
from kernels import linear_logps
from model import Llama
from reward import tree_rewards
from step import sequence_logps
from trees import Tree, build_stream, make_trees, pack, prefix_stream
from world import BODIES, CLOSINGS, answers, base_model, held_out_prompts, question

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

def world_trees(tokenizer: Tokenizer, asked) -> list[Tree]:
    """Every valid answer to every prompt, in the order of `answers`."""
    trees = []
    for verb, thing in asked:
        listed = answers(verb, thing)
        prompt_ids, _ = encode_dialogue(tokenizer, [("Human", question(verb, thing))])
        ids = [encode_dialogue(tokenizer, [("Assistant", text)])[1] for text, *_ in listed]
        trees += [Tree(prompt_ids, ids[i:i + ANSWERS_PER_TREE], [1.0] * ANSWERS_PER_TREE, [])
                  for i in range(0, len(ids), ANSWERS_PER_TREE)]
    return trees


@torch.no_grad()
def world_logps(model: Llama, tokenizer: Tokenizer, asked) -> tuple[Tensor, Tensor]:
    """log π(y | x) of every valid answer to every prompt, float64 nats; and lengths: [X, Y] each.

    Answers with the same opening share one stream, their common beginnings computed once: a third
    of the tokens, and of the time, that trees of 24 answers take.
    """
    logps, lengths, device = [], [], model.lm_head.weight.device
    for verb, thing in asked:
        prompt_ids, _ = encode_dialogue(tokenizer, [("Human", question(verb, thing))])
        ids = [encode_dialogue(tokenizer, [("Assistant", text)])[1]
               for text, *_ in answers(verb, thing)]
        lengths.append([len(response) for response in ids])
        for i in range(0, len(ids), ANSWERS_PER_OPENING):
            *stream, segments, parents, paths = prefix_stream(
                prompt_ids, ids[i:i + ANSWERS_PER_OPENING])
            input_ids, position_ids, parents = (torch.tensor(t, device=device)
                                                for t in (*stream, parents))
            hidden = model(input_ids, position_ids, segments.to(device))         # [T, D]
            hidden = hidden[parents[len(prompt_ids):]]                           # [N, D]
            per_token_logps, _ = linear_logps(
                hidden, hidden[:0], model.lm_head.weight, input_ids[len(prompt_ids):],
                input_ids[:0])                                                   # [N]
            padded = torch.cat([per_token_logps.new_zeros(len(prompt_ids)), per_token_logps])
            logps += [float(padded[path].double().sum()) for path in paths]
    return (torch.tensor(logps, dtype=torch.float64).view(len(asked), -1), torch.tensor(lengths))


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


def world_scores(logps: Tensor, reference_logps: Tensor, lengths: Tensor, listed,
                 beta: float) -> dict[str, float]:
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


def evaluate_world(policies: dict[str, Tensor], reference: Tensor, lengths: Tensor, asked,
                   beta: float) -> dict[str, dict]:
    """Mean WORLD_METRICS over prompts, for every policy and for the optimum pi*."""
    lists = [answers(*prompt) for prompt in asked]
    policies = dict(policies)
    policies["optimum pi*"] = torch.stack([
        optimum(with_rest(ref), torch.tensor([r for _, r, *_ in listed]
                                             + [min(r for _, r, *_ in listed)]), beta)[0][:-1]
        for ref, listed in zip(reference, lists)])
    return {name: mean_scores([world_scores(*row, beta) for row in
                               zip(logps, reference, lengths, lists)])
            for name, logps in policies.items()}


def print_samples(policies: dict[str, Tensor], asked, seed: int = 0) -> None:
    """One answer of every policy's exact distribution, to a harmful and a harmless prompt."""
    lists = [answers(*prompt) for prompt in asked]
    harmful = [any(bad for _, _, bad, _ in listed[:36]) for listed in lists]
    for number in (harmful.index(True), harmful.index(False)):
        print(f"\n{question(*asked[number])}")
        for name, logps in policies.items():
            generator = torch.Generator().manual_seed(seed)
            probs = with_rest(logps[number]).exp()
            drawn = int(torch.multinomial(probs, 1, generator=generator))
            worst = min(reward for _, reward, *_ in lists[number])
            nothing = ("(not a valid answer)", worst, False, 0)
            text, reward, bad, _ = (*lists[number], nothing)[drawn]
            print(f"  {name:14} r* {reward:+.1f} {'HARMFUL ' if bad else '        '} {text}")


# ---- files: held-out likelihoods ----------------------------------------------------------------

@torch.no_grad()
def evaluate_file(model: Llama, reference, trees: list[Tree], beta: float) -> None:
    """Print perplexities and the accuracy of the implicit reward, each with its definition."""
    rows, pairs = {1: [], 0: []}, []
    for group in pack(trees, 8192):
        stream = build_stream(group, model.lm_head.weight.device)
        policy, frozen = (t.double().cpu() for t in
                          sequence_logps(model, reference, stream, stream))      # [R], [R]
        lengths = stream.response_ids.bincount(minlength=len(policy)).double().cpu()
        scores, rewards = stream.scores.cpu(), beta * (policy - frozen)
        for z in rows:
            rows[z].append(torch.stack([policy, frozen, lengths], 1)[scores == z])
        chosen, rejected = stream.pairs.cpu().T
        pairs.append(torch.stack([rewards[chosen] - rewards[rejected],
                                  lengths[rejected] - lengths[chosen]], 1))      # [P, 2]
    for z, name in ((1, "good (z = 1)"), (0, "bad (z = 0)")):
        values = torch.cat(rows[z])                                              # [R, 3]
        if len(values):
            for column, who in ((0, "policy"), (1, "reference")):
                value, low, high = bootstrap(
                    lambda v: (-v[:, column].sum() / v[:, 2].sum()).exp(), values)
                print(f"  perplexity of {name} responses under the {who:9}  {value:9.2f} "
                      f"[{low:.2f}, {high:.2f}]   exp(-log-probs / tokens), {len(values)} "
                      "responses")
    print_accuracy(torch.cat(pairs), "implicit reward", "beta log(pi / pi_ref)")


def print_accuracy(margins: Tensor, name: str, what: str) -> None:
    """How often a reward, and a rule that looks at length only, prefer the better response.

    margins   [P, 2] float   reward of the better less that of the worse; tokens of the worse less
                             those of the better
    """
    if not len(margins):
        print("  no prompt has a better and a worse response: no reward accuracy")
        return
    for column, (name, rule) in enumerate((
            (name, f"{what} is larger for the better response"),
            ("length only", "the better response has fewer tokens"))):
        value, low, high = bootstrap(lambda v: wins(v[:, column]), margins)
        print(f"  accuracy of {name:15}  {value:.3f} [{low:.3f}, {high:.3f}]   share of "
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


def evaluate_world_rewards(model: Llama, tokenizer: Tokenizer, asked) -> None:
    """Print how a reward model orders all valid answers to every prompt, against the truth."""
    trees = world_trees(tokenizer, asked)
    rewards = tree_rewards(model, trees).view(len(asked), -1)                    # [X, Y]
    lengths = torch.tensor([len(ids) for tree in trees for ids in tree.response_ids])
    truth = torch.tensor([[r for _, r, *_ in answers(*prompt)] for prompt in asked])
    scores = torch.tensor([[*agreement(r, t), *agreement(-n, t)] for r, t, n in zip(
        rewards, truth, lengths.view_as(rewards))])                              # [X, 4]
    for column, name in enumerate(("accuracy of the reward model", "rank correlation",
                                   "accuracy of length only", "its rank correlation")):
        value, low, high = bootstrap(lambda v: v[:, column].mean(), scores)
        print(f"  {name:28}  {value:.3f} [{low:.3f}, {high:.3f}]")
    print(f"  over all pairs of the {rewards.shape[1]} answers to a prompt with different true "
          f"rewards; means of {len(asked)} test prompts.\n  Length only prefers the shorter.")


def evaluate_file_rewards(model: Llama, trees: list[Tree]) -> None:
    """Print the accuracy of a reward model on the pairs of a file."""
    rewards, lengths, pairs = tree_rewards(model, trees).cpu(), [], []
    for tree in trees:
        pairs += [(len(lengths) + i, len(lengths) + j) for i, j in tree.pairs]
        lengths += [len(ids) for ids in tree.response_ids]
    chosen, rejected = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    shorter = torch.tensor(lengths)[rejected] - torch.tensor(lengths)[chosen]
    print_accuracy(torch.stack([rewards[chosen] - rewards[rejected], shorter], 1).double(),
                   "reward model", "r(x, y)")


# ---- runs ---------------------------------------------------------------------------------------

def evaluated_records(path: str, flags: dict, dataset: str | None):
    """(file, records): those of --dataset, else what the run at `path` held out of its own data."""
    file = dataset or flags["dataset"]
    records = read_dataset(file)
    if dataset is None:
        records = split_by_prompt(records, flags["held_out"])[1]
    if not records:
        raise ValueError(f"{path} held out nothing of {file}: train it with --held_out, or "
                         "pass --dataset")
    return file, records


def on_world(flags: dict, dataset: str | None) -> bool:
    return dataset is None and os.path.abspath(flags["model_name_or_path"]) == os.path.abspath(
        base_model())


def best_and_worst(asked) -> list[Record]:
    """The world's prompts with the answers of the largest and the smallest true reward."""
    lists = [sorted(answers(*prompt), key=lambda answer: -answer[1]) for prompt in asked]
    return [Record((("Human", question(*prompt)),), (listed[0][0], listed[-1][0]), (1.0, 0.0),
                   "world") for prompt, listed in zip(asked, lists)]


def show_heatmap(paths: list[str], dataset: str | None, beta: float | None, first: int,
                 html: str | None) -> None:
    """Colour the tokens of every run's first records; write the page if `html` names a file."""
    runs = {}
    for path in paths:
        model, reference, flags = load_run(path)
        if reference is None:
            raise ValueError(f"{path} is a reward model; --heatmap colours what a policy likes")
        records = (best_and_worst(held_out_prompts()) if on_world(flags, dataset)
                   else evaluated_records(path, flags, dataset)[1])
        tokenizer = Tokenizer(flags["model_name_or_path"])
        trees = make_trees(records[:first], tokenizer, "all", flags["max_length"],
                           flags["max_prompt_length"])
        runs[path] = [response for tree in trees for response in responses_of(
            model, reference, tokenizer, tree, flags["beta"] if beta is None else beta)]
        print(f"\n{path}")
        print_responses(runs[path], sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if html:
        write_text(html, page(runs))
        print(f"\n{html}: the same as a page")


def evaluate_runs(paths: list[str], dataset: str | None, asked_beta: float | None,
                  json_file: str | None) -> None:
    """Print what every run is worth: one table for those on the world, a list for each other."""
    policies, asked, reference = {}, held_out_prompts(), None
    tabled = (flags for flags in map(read_run, paths) if on_world(flags, dataset)
              and not flags["method"].endswith("reward_model"))
    if json_file and not any(tabled):
        raise ValueError("--json writes the world's table, and none of these runs was on the world")
    for path in paths:
        model, reference_of, flags = load_run(path)
        beta = flags["beta"] if asked_beta is None else asked_beta
        if on_world(flags, dataset):
            tokenizer = Tokenizer(base_model())
            if reference_of is None:
                print(f"{path} [95 % bootstrap interval over prompts]")
                evaluate_world_rewards(model, tokenizer, asked)
                continue
            if reference is None:
                sft_adapter = flags.get("sft_adapter")
                with reference_of() as frozen:
                    reference, lengths = world_logps(frozen, tokenizer, asked)
                policies["base + SFT" if sft_adapter else "base"] = reference
            elif flags.get("sft_adapter") != sft_adapter:
                raise ValueError(f"{path} starts from --sft_adapter {flags.get('sft_adapter')}, "
                                 f"the run before it from {sft_adapter}: measure them apart")
            policies[os.path.basename(os.path.normpath(path))] = world_logps(
                model, tokenizer, asked)[0]
            continue
        file, records = evaluated_records(path, flags, dataset)
        trees = make_trees(records, Tokenizer(flags["model_name_or_path"]), "all",
                           flags["max_length"], flags["max_prompt_length"])
        print(f"{path} on {len(records)} records of {file} [95 % bootstrap interval over rows]")
        if reference_of is None:
            evaluate_file_rewards(model, trees)
        else:
            evaluate_file(model, reference_of, trees, beta)
    if policies:
        table = evaluate_world(policies, reference, lengths, asked, beta)
        print("  ".join(["policy        ", *(f"{key:>11}" for key in WORLD_METRICS)]))
        for name, row in table.items():
            print("  ".join([f"{name:14}", *(f"{row[key]:11.4g}" for key in WORLD_METRICS)]))
        print_samples(policies, asked)
        print(f"\n{len(asked)} test prompts, beta {beta:g}. " + ". ".join(
            f"{key}: {meaning}" for key, meaning in WORLD_METRICS.items()) + ".")
        if json_file:
            with open(json_file, "w", encoding="utf-8") as stream:
                json.dump(table, stream, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of train.py")
    parser.add_argument("--dataset", help="evaluate on this file, not on what the run held out")
    parser.add_argument("--beta", type=float, help="of rewards and of pi* (default: the run's)")
    parser.add_argument("--json", help="also write the world's table here")
    parser.add_argument("--heatmap", action="store_true",
                        help="instead: colour each token by beta log(pi / pi_ref)")
    parser.add_argument("--first", type=int, default=3, help="with --heatmap: how many records (3)")
    parser.add_argument("--html", help="with --heatmap: also write it as a page here")
    if sys.argv[1:2] == ["judge"]:
        return judge.main(sys.argv[2:])
    args = parser.parse_args()
    if args.first < 1 or (args.html and not args.heatmap):
        raise ValueError(f"--first is {args.first}; expected at least 1" if args.first < 1 else
                         "--html goes with --heatmap")
    if args.heatmap:
        return show_heatmap(args.runs, args.dataset, args.beta, args.first, args.html)
    evaluate_runs(args.runs, args.dataset, args.beta, args.json)


if __name__ == "__main__":
    run_cli(main)
