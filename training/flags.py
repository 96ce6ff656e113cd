"""The flags of train.py. Nothing here imports torch: --help and wrong flags are answered at once.

Names are TRL's where the meaning is TRL's. What else a script for TRL may pass is in ELSEWHERE.
"""
import argparse
import math
import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec

from files.cli import SEEDS, Help, Parser, check_ranges
from files.text import stripped_lines

# METHODS of step.py and MAX_RESPONSES - 1 of packing.py, without what they import (a test compares)
METHOD_NAMES = ("ulma", "ulma_mse", "pointwise_dpo", "pointwise_mse", "bco", "kto", "dpo", "ipo",
                "simpo", "sft", "positive_dpo", "unlearning", "negative_dpo", "d2o", "unlikelihood",
                "reward_model", "pointwise_reward_model", "mse_reward_model")
MOST_ANCHORS = 15

# train.py's defaults on the world. Its rewards span 8 nats, so beta = 0.1 would ask for log-ratios
# of 80; its model is 128 wide, so adapters sit on every layer and learn fast.
WORLD_FLAGS = {"beta": 0.5, "learning_rate": 1e-3, "num_train_epochs": 2.0, "batch_size": 32,
               "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                       "up_proj", "down_proj"]}

REDUCTIONS = ("mean", "class", "tokens", "authors")

D2O_FLAGS = {             # name: type, default, help
    "num_anchors": (int, 11, f"self-generated responses per prompt, 1 to {MOST_ANCHORS}"),
    "alpha": (float, None, "weight of the negative's log-ratio (default: --beta, as in the paper)"),
    "refresh_anchors": (int, 0, "steps after which new anchors are sampled from the policy; 0: "
                                "only from the base model. Warning: 1 makes anchors of the "
                                "current policy, whose expected gradient is zero: noise"),
    "anchors": (str, None, "file of completions that were sampled elsewhere, see docs/usage.md; "
                           "STEP in its name stands for the step of each refresh"),
    "anchor_instructions": (str, None, "file of system sentences, one a line: each anchor is sampled "
                                       "under one of them, as study/moral_instructions.txt, which "
                                       "is not trained on"),
    "anchor_tokens": (int, 256, "an anchor ends here, or after EOS"),
}

ELSEWHERE = {             # what other trainers call a flag: what to do here
    "--per_device_train_batch_size": "--batch_size is a whole step's, over all ranks; "
                                     "--micro_tokens bounds one forward pass",
    "--gradient_accumulation_steps": "--batch_size is a whole step's; --micro_tokens bounds one "
                                     "forward pass",
    "--loss_type": "--method names the objective",
    "--logp_reduction": "--reduction tokens averages log-probs over tokens",
    "--use_peft": "an adapter is the default, and --lora_r 0 trains all weights",
    "--lora_dropout": "it is 0.1 for methods without a reference, and 0 for the others",
    "--load_in_4bit": "docs/usage.md, Memory, says why not and what fits where",
    "--warmup_ratio": "--warmup_steps below 1 is a fraction of the run",
    "--weight_decay": "it is 0",
    "--max_grad_norm": "gradients are clipped to norm 1",
    "--overwrite_output_dir": "remove the folder, or choose another --output_dir",
    "--save_total_limit": "the newest two checkpoints stay",
    "--attention": "--kernels chooses log-probs and attention together",
}


def add_what_flags(parser: argparse.ArgumentParser, methods: Collection[str]) -> None:
    flag = parser.add_argument_group("what").add_argument
    flag("--method", choices=methods, default="ulma",
         help="objective: ulma.py has the formulas, docs/usage.md what each trains on")
    flag("--model_name_or_path", help="Hugging Face Llama folder (default: the embedded world's)")
    flag("--chat_template", help="vicuna; model: the folder's own; or a jinja file (default: the "
                                 "folder's chat_template.jinja, else vicuna; docs/usage.md)")
    flag("--sft_adapter", help="PEFT folder, from train.py or not: policy and reference start from "
                               "the model with this adapter")
    flag("--dataset", "--dataset_name", help="HH, Golden HH, QA-feedback, red-team or JSONL file, "
         ".gz or not; a folder of them, or several with commas between "
         "(default: the embedded world's)")
    flag("--held_out", type=float, default=0.0,
         help="fraction of prompts never trained on; --eval_steps and eval.py measure on them")
    flag("--output_dir", default="runs/METHOD", help="METHOD stands for --method")
    flag = parser.add_argument_group("objective").add_argument
    flag("--beta", type=float, default=0.1, help="multiplies log pi/pi_ref: KL strength; "
         "ipo's tau; simpo wants about 2, and its margin is half of it")
    flag("--log_z", type=float, default=0.0, help="stand-in for beta log Z(x); 0 is the papers'; "
         "added to what bco and kto estimate")
    flag("--reduction", choices=REDUCTIONS, default="mean",
         help="mean: over responses, of losses of summed log-probs (papers); class: mean over "
              "positives + mean over the rest; tokens: of log-probs averaged over tokens; authors: "
              "both, as in the authors' code, whose DPO has sums")


def add_d2o_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("d2o").add_argument
    for name, (kind, default, text) in D2O_FLAGS.items():
        flag(f"--{name}", type=kind, default=default, help=text)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("optimization").add_argument
    flag("--learning_rate", type=float, default=1e-5,
         help="peak, then a cosine to 0; docs/usage.md has what was found good for each method")
    flag("--batch_size", type=int, default=64,
         help="responses per step over all ranks; pairs for methods of pairs; prompts for d2o. "
              "A prompt with more of them is a step of its own")
    flag("--num_train_epochs", type=float, default=1.0, help="passes over the data")
    flag("--max_steps", type=int, default=-1, help="overrides epochs if > 0")
    flag("--warmup_steps", type=float, default=0, help="linear warm-up; < 1 is a fraction")
    flag("--seed", type=int, default=42, help="seeds data order, initialisation and dropout")
    flag = parser.add_argument_group("adapter").add_argument
    flag("--lora_r", type=int, default=8, help="rank; 0 trains all weights")
    flag("--lora_alpha", type=float, default=32, help="scaling is alpha / r")
    flag("--lora_target_modules", nargs="+", default=["q_proj", "v_proj"], help="linear layers")
    flag = parser.add_argument_group("size and speed").add_argument
    flag("--max_length", type=int, default=1024, help="tokens of prompt + response")
    flag("--max_prompt_length", type=int, help="longer prompts lose their left end (default: half "
         "of --max_length)")
    flag("--micro_tokens", type=int, default=8192, help="tokens per forward pass and rank")
    flag("--bf16", action="store_true", help="bfloat16 weights; adapters stay float32")
    flag("--gradient_checkpointing", action="store_true",
         help="run each layer again in the backward: less memory, a third more time")
    flag("--fsdp", action="store_true", help="shard the frozen layers over all ranks, for a model "
         "that one device cannot hold")
    flag("--kernels", choices=("auto", "torch", "triton"), default="auto",
         help="of log-probs and attention; torch: plain torch, what a CPU runs; triton: our own, "
              "what a GPU runs")


def add_saving_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("logging and saving").add_argument
    flag("--logging_steps", type=int, default=10, help="steps per logged line")
    flag("--eval_steps", type=int, default=0, help="steps after which what --held_out keeps apart "
         "is measured, and two of its prompts answered; 0: never")
    flag("--report_to", choices=("none", "tensorboard"), default="none",
         help="also write TensorBoard's files into --output_dir (pip install tensorboard)")
    flag("--save_steps", type=int, default=100, help="steps per checkpoint; the newest two stay")


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for invalid values or combinations."""
    zero_or_more = (0, math.inf)
    check_ranges(args, ("batch_size", "micro_tokens", "logging_steps", "save_steps"), {
        "held_out": (0, 1), "log_z": (-math.inf, math.inf), "seed": SEEDS,
        **dict.fromkeys(("learning_rate", "warmup_steps", "num_train_epochs", "beta", "lora_alpha",
                         "eval_steps"), zero_or_more)})
    for refused, message in (
        (bool(args.dataset) != bool(args.model_name_or_path),
         "--dataset and --model_name_or_path go together (leave out both for the embedded world)"),
        (args.method.endswith("reward_model") and args.lora_r == 0,
         f"--method {args.method} trains an adapter and a head; --lora_r must be at least 1"),
        (args.fsdp and (args.lora_r == 0 or args.sft_adapter or args.method == "d2o"),
         "--fsdp shards the frozen weights under one adapter; it does not go with --lora_r 0, "
         "--sft_adapter (merge it with python -m tools.export) or --method d2o"),
        (args.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2,
         "--fsdp needs two or more processes: torchrun --nproc_per_node=2 train.py"),
        (args.eval_steps and not args.held_out,
         "--eval_steps measures what --held_out keeps apart; give both, as --held_out 0.05"),
        (args.report_to == "tensorboard" and not find_spec("tensorboard"),
         "--report_to tensorboard needs its package: pip install tensorboard"),
        (args.bf16 and args.lora_r == 0,
         "--bf16 with --lora_r 0 would round AdamW's updates away; train all weights in float32"),
    ):
        if refused:
            raise ValueError(message)


def check_d2o_flags(args: argparse.Namespace) -> None:
    """The same for the flags of d2o, and for any of them without --method d2o."""
    if args.method != "d2o":
        given = [f"--{name}" for name, (_, default, _) in D2O_FLAGS.items()
                 if getattr(args, name) != default]
        if given:
            raise ValueError(f"{', '.join(given)}: only --method d2o reads this, not {args.method}")
        return
    if not 1 <= args.num_anchors <= MOST_ANCHORS:
        raise ValueError(f"--num_anchors {args.num_anchors} must be in [1, {MOST_ANCHORS}]: a "
                         f"tree holds {MOST_ANCHORS + 1} responses, and one is the negative")
    if args.refresh_anchors < 0 or not 0 <= (args.alpha or 0) < float("inf"):
        raise ValueError(f"--refresh_anchors {args.refresh_anchors} and --alpha {args.alpha} must "
                         "be at least 0, and finite")
    if not 1 <= args.anchor_tokens <= args.max_length - args.max_prompt_length:
        raise ValueError(f"--anchor_tokens {args.anchor_tokens} must be in [1, "
                         f"{args.max_length - args.max_prompt_length}], the room that --max_length "
                         f"{args.max_length} leaves after --max_prompt_length "
                         f"{args.max_prompt_length}")
    if args.anchors and args.refresh_anchors and (
            "STEP" not in args.anchors or args.refresh_anchors % args.save_steps):
        raise ValueError(
            f"--anchors {args.anchors} with --refresh_anchors {args.refresh_anchors}: each refresh "
            "needs a file of its own (write STEP in the name) and a checkpoint to sample from: "
            f"--save_steps {args.save_steps} must divide {args.refresh_anchors}")
    if args.anchors and not os.path.isfile(file := args.anchors.replace("STEP", "0")):
        raise FileNotFoundError(f"--anchors: {file}: no such file")
    if args.anchor_instructions and args.anchors:
        raise ValueError("--anchor_instructions is for anchors that are sampled here, not for those "
                         "of --anchors")
    if args.anchor_instructions and not stripped_lines(args.anchor_instructions):
        raise ValueError(f"--anchor_instructions {args.anchor_instructions} holds no sentence")


def build_parser(methods: Collection[str] = METHOD_NAMES,
                 description: str | None = None) -> Parser:
    parser = Parser(description=description, formatter_class=Help, elsewhere=ELSEWHERE,
                    epilog="defaults on the embedded world:\n  " + "\n  ".join(
                        f"{name} {value}" for name, value in WORLD_FLAGS.items()))
    add_what_flags(parser, methods)
    add_d2o_flags(parser)
    add_training_flags(parser)
    add_saving_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None, methods: Collection[str] = METHOD_NAMES,
               description: str | None = None) -> argparse.Namespace:
    """The flags, checked; `methods` are what --method may name."""
    parser = build_parser(methods, description)
    args = parser.parse_args(argv)
    if args.dataset is None:
        parser.set_defaults(**WORLD_FLAGS)               # the flags that were given still win
        args = parser.parse_args(argv)
    if args.max_prompt_length is None:
        args.max_prompt_length = max(2, args.max_length // 2)
    args.output_dir = os.path.normpath(args.output_dir.replace("METHOD", args.method))
    check_flags(args)
    check_d2o_flags(args)
    if args.method == "d2o" and args.alpha is None:
        args.alpha = args.beta
    return args
