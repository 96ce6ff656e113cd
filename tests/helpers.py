"""Small models, trees and runs of train.py that several test files share.

Functions only; fixtures, commands and files are in conftest.py.
"""
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from plain import random_weights

from lora import add_lora, add_score_head, lora_disabled, save_adapter
from model import Llama, LlamaConfig, load_llama
from packing import Tree
from step import METHODS, Compute, Objective, batch_counts, micro_batches
from train import accumulate_gradient
from training.checkpoint import trainable

# ---- a Llama with the weights of tests/plain.py -------------------------------------------------

SHAPE = dict(vocab_size=29, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, rms_norm_eps=1e-5, rope_theta=100.0)
CONFIGS = {
    "multi-head": LlamaConfig(**SHAPE),
    "grouped-query": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "multi-query": LlamaConfig(**SHAPE, num_key_value_heads=1),
    "tied head": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "rope factor 2": LlamaConfig(**SHAPE, num_key_value_heads=2, rope_factor=2.0),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
GQA = CONFIGS["grouped-query"]


def make_llama(config, seed=0):
    """The project's model with plain.py's random weights, float64; and those weights."""
    weights = random_weights(config, seed)
    model = Llama(config).double()
    model.load_state_dict(weights)
    return model, weights


def random_tokens(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SHAPE["vocab_size"], (length,), generator=generator).tolist()


def random_trees():
    """Five trees for make_llama: 14, 3, 8, 11 and 18 tokens, one response of a single EOS."""
    sizes = [(5, [4, 1, 7]), (1, [3]), (8, [1]), (3, [2, 2, 2, 6]), (6, [9, 5])]
    trees, seed = [], 100
    for prompt_size, response_sizes in sizes:
        responses = [random_tokens(n - 1, seed + k) + [2] for k, n in enumerate(response_sizes)]
        trees.append(Tree([1] + random_tokens(prompt_size - 1, seed + 50), responses,
                          [1.0] * len(responses), []))
        seed += 100
    return trees


# ---- a model under training, and a batch for it -------------------------------------------------

def make_model(dtype=torch.float64, seed=0, score_head=False):
    """A Llama with adapters (and a score head) that are not zero: zero would hide the log-ratio."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48,
                              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    add_lora(model, r=4, alpha=8, dropout=0.0)
    if score_head:
        add_score_head(model)
    for name, p in trainable(model).items():
        if name.endswith("lora_B") or name == "score.weight":
            torch.nn.init.normal_(p, std=0.05)
    return model.to(dtype)


def make_trees(count=11, seed=1):
    """Uneven trees for make_model: 1 to 3 responses, some of one token, scores of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 97, (size,), generator=generator).tolist()

    trees = []
    for number in range(count):
        responses = [ids(0, 9) + [2] for _ in range(1 + number % 3)]
        scores = ([1.0, 0.0, 1.0] if number % 2 else [0.0, 1.0, 0.25])[:len(responses)]
        pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores))
                 if scores[i] > scores[j]]
        trees.append(Tree([1] + ids(1, 12), responses, scores, pairs))
    return trees


def anchored(trees):
    """Trees [negative, two anchors] for every response, with reference_logps from anywhere."""
    generator, made = torch.Generator().manual_seed(3), []
    for tree in trees:
        for ids in tree.response_ids:
            logps = (-9 * torch.rand(3, generator=generator)).tolist()
            made.append(Tree(tree.prompt_ids, [ids, ids[::-1], [5, 7] + ids], [0.0, 1.0, 1.0],
                             [(1, 0), (2, 0)], logps))
    return made


def usable(trees, trains_on):
    """The trees reduced to the responses a method trains on (as make_trees does for records)."""
    if trains_on == "anchors":
        return anchored(trees)
    out = []
    for tree in trees:
        used = [i for i, z in enumerate(tree.scores)
                if trains_on == "all" or {"positive": 1, "negative": 0}.get(trains_on) == z
                or (trains_on == "pairs" and any(i in pair for pair in tree.pairs))]
        if used:
            new = {old: n for n, old in enumerate(used)}
            out.append(Tree(tree.prompt_ids, [tree.response_ids[i] for i in used],
                            [tree.scores[i] for i in used],
                            [(new[i], new[j]) for i, j in tree.pairs if i in new and j in new]))
    return out


def backward(model, trees, name, *, batch=None, reference=None, compute=None, **settings):
    """Forward and backward of trees: what train.accumulate_gradient returns.

    batch      the whole batch, if the trees are one rank's share of it
    reference  the same weights without adapters, unless another is given
    compute    step.Compute() unless another is given
    settings   see step.Objective
    """
    method, compute = METHODS[name], compute or Compute()
    return accumulate_gradient(
        model, reference or partial(lora_disabled, model), micro_batches(trees, method, compute),
        batch_counts(batch or trees), Objective(method, **settings), compute)


def no_reference(model):
    """A reference that cannot be run: a step that has its log-probs asks only for its width."""
    return partial(contextlib.nullcontext,
                   SimpleNamespace(config=model.config, lm_head=model.lm_head))


def flat_gradient(model):
    """The gradient of everything that is trained, as one flat tensor."""
    return torch.cat([p.grad.flatten() for p in trainable(model).values()])


# ---- runs of train.py ---------------------------------------------------------------------------

def train_flags(model, data, out, *flags):
    """conftest.launch's and conftest.finish's arguments for a small run; flags given win."""
    return ("train.py", "--model_name_or_path", model, "--dataset", data, "--output_dir", out,
            "--batch_size", "8", "--learning_rate", "1e-3", "--micro_tokens", "128",
            "--save_steps", "3", "--logging_steps", "1", *flags)


def command(model, data, out, *flags, ranks=1):
    """The command line of a small run of train.py."""
    return conftest.launch(*train_flags(model, data, out, *flags), ranks=ranks)


def finish(model, data, out, *flags, ranks=1):
    """Run train.py on a small model to its end; returns what it printed."""
    return conftest.finish(*train_flags(model, data, out, *flags), ranks=ranks)


def adapter_hash(out):
    """SHA-256 of the adapter that a run left."""
    return hashlib.sha256((Path(out) / "final/adapter_model.safetensors").read_bytes()).hexdigest()


def logged(out, *without):
    """The lines of metrics.jsonl, without the speed and the keys named."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("tokens_per_s", *without)}
            for line in lines]


def reward_model_in(folder, base):
    """A model with random adapters and head on a Hugging Face folder, saved; returns the model."""
    model = add_score_head(add_lora(load_llama(base), r=4, alpha=8, dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for p in trainable(model).values():
        with torch.no_grad():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    save_adapter(model, str(folder), base)
    return model


def wait_for_lines(process, file, lines):
    """Wait until a file has so many lines, or the process that writes it has ended."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if file.exists() and file.read_text().count("\n") >= lines:
            return
        time.sleep(0.002)


def processes_below(root):
    """The ids of a process and of all that it and its children have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):                             # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()       # after the command's name
            parents[int(stat.parent.name)] = int(fields[1])
    found = [root]
    for pid in found:                                                  # it grows on the way
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def kill_with_workers(process):
    """SIGKILL a command and the workers that torchrun has started for it (they would go on)."""
    if process.poll() is not None:
        return                                                         # it has ended by itself
    for pid in processes_below(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_ranks(folder, body, ranks):
    """Run Python code on some gloo ranks, with tests/helpers.py imported; `rank` is its rank."""
    script = Path(folder) / "ranks.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(conftest.ROOT)!r}, {str(conftest.ROOT / "tests")!r}]
import torch
import torch.distributed as dist
from helpers import *
from files.cli import end_at_once
from training.ranks import set_up_processes
rank, world_size, device = set_up_processes()
{body}
dist.barrier()
dist.destroy_process_group()
end_at_once(0)
""")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", str(script)], cwd=folder, env=conftest.ONE_THREAD,
        capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
