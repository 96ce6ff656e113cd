"""The flags of rlhf/ppo.py. Nothing here imports torch, see training/flags.py. Names are TRL's."""
import argparse
import math

from files.cli import SEEDS, Help, Parser, check_ranges

# On the embedded world, as train.py's: a small model takes large steps. 1e-2 is too large: most
# mass left the valid answers, at a true reward of -5.5. The objective stops rising after some 30
# steps.
WORLD_FLAGS = {"learning_rate": 1e-3, "warmup_steps": 5, "batch_size": 19, "num_generations": 4,
               "num_ppo_epochs": 2, "max_new_tokens": 48, "max_steps": 40}
INHERITED = ("beta", "dataset", "held_out", "max_prompt_length")


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser; some defaults are those of the reward model's run."""
    parser = Parser(description=description, formatter_class=Help, epilog=(
        "defaults on the embedded world: " + ", ".join(f"{k} {v}" for k, v in WORLD_FLAGS.items())))
    flag = parser.add_argument_group("what").add_argument
    flag("--reward_model", required=True,
         help="finished run of train.py --method …reward_model; its flags are the defaults of "
              + ", ".join(INHERITED))
    flag("--dataset", help="prompts: any file train.py reads")
    flag("--held_out", type=float, help="fraction of prompts never sampled for")
    flag("--output_dir", default="runs/METHOD", help="METHOD stands for rlhf or pointwise_rlhf")
    flag = parser.add_argument_group("objective").add_argument
    flag("--beta", "--kl_coef", type=float, help="KL strength")
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
    flag("--seed", type=int, default=42, help="of order, sampling and initialisation")
    flag = parser.add_argument_group("size, saving").add_argument
    flag("--max_prompt_length", type=int, help="longer prompts lose their left end")
    flag("--max_new_tokens", "--response_length", type=int, default=128,
         help="a response ends here, or after EOS")
    flag("--micro_tokens", type=int, default=8192, help="tokens per forward pass and rank")
    flag("--save_steps", type=int, default=20, help="steps per checkpoint; the newest two stay")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for invalid values."""
    check_ranges(args, (
        "batch_size", "micro_tokens", "save_steps", "num_ppo_epochs", "num_mini_batches",
        "num_generations", "max_new_tokens"), {
        "held_out": (0, 1), "gamma": (0, 1), "lam": (0, 1), "cliprange": (0, 1), "seed": SEEDS} | {
        name: (0, math.inf) for name in (
            "beta", "learning_rate", "warmup_steps", "num_train_epochs", "vf_coef",
            "cliprange_value", "missing_eos_penalty")})
    if args.max_prompt_length < 2:
        raise ValueError(f"--max_prompt_length {args.max_prompt_length} must be at least 2")
