"""Time and peak memory of one LoRA training step on a CPU: this project against TRL + PEFT.

    python bench/step.py --dataset test.jsonl.gz --tokenizer tokenizer.model      (`make bench`)

One step is: policy forward, reference forward with the adapters off, loss, backward, clipping,
AdamW. Everybody takes it on the same HH pairs, token for token, from the same random Llama and
the same random adapter, with the same learning rate, so the DPO losses must agree step by step;
the table is worth nothing where they do not, and the script then ends in an error.

    ours-dpo     this project, DPO
    ours-ulma    this project, ULMA on the same responses (no reference for the good ones)
    trl          TRL's DPOTrainer as it comes: padded batch, gradient checkpointing, and on a CPU
                 an LM head that scores every position, padding included
    trl-compact  the same with TRL's head held to response tokens, as TRL does on a GPU

each in fp32 and in bf16 weights. A precision's implementations run as processes of their own
(so that the peak memory is theirs) that live side by side and take their steps in turn
A B C D A B C D ..., one at a time, so that a slow minute of the machine hits all of them.

Needs, beside this project's packages: trl==1.16.0, peft, transformers (this file reaches into
TRL, see `force_compact_head`). `make bench` installs them in .venv-bench; nothing is downloaded
while it runs. About 10 GB of memory for the default 8 pairs. Mind the field `bf16_instructions`
of the result: on a CPU without them torch multiplies bf16 matrices 10 to 200 times slower than
fp32 ones, a bf16 step of TRL takes many minutes, and the bf16 ratios tell of that and little else.
"""

import argparse
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

# The process that compares imports neither torch nor the project: on Linux a child's ru_maxrss
# starts at its parent's, so a big parent would hide what a small worker needs.

IMPLEMENTATIONS = ("ours-dpo", "ours-ulma", "trl", "trl-compact")
PRECISIONS = ("fp32", "bf16")
MODEL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 8, "intermediate_size": 1408, "vocab_size": 32000}
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-4, 1.0            # but for the rate, TRL's defaults
MICRO_TOKENS = 1024                                            # train.py --micro_tokens


def hh_pairs(dataset: str, tokenizer: str, n: int) -> list[dict]:
    """The first n records of an HH file that have two responses, as token ids.

    dataset    path of an HH .jsonl.gz
    tokenizer  path of a SentencePiece model
    returns    [{"prompt": ids, "chosen": ids, "rejected": ids}]; a prompt starts with BOS, a
               response ends with EOS, so nobody has to add anything
    raises     ValueError if the file has fewer than n
    """
    import data

    encoder, pairs = data.Tokenizer(tokenizer), []
    for record in data.read_hh(dataset):
        if sorted(record.scores) != [0, 1]:
            continue
        chosen, rejected = (record.responses[record.scores.index(score)] for score in (1, 0))
        prompt_ids, chosen_ids = data.encode_dialogue(
            encoder, [*record.prompt, ("Assistant", chosen)])
        _, rejected_ids = data.encode_dialogue(encoder, [*record.prompt, ("Assistant", rejected)])
        pairs.append({"prompt": prompt_ids, "chosen": chosen_ids, "rejected": rejected_ids})
        if len(pairs) == n:
            return pairs
    raise ValueError(f"{dataset}: {len(pairs)} records with two responses, --pairs asks for {n}")


def write_checkpoint(folder: Path) -> None:
    """A random Llama in Hugging Face's format: config.json and model.safetensors, float32."""
    import torch
    from safetensors.torch import save_file

    D, F, V = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["vocab_size"]
    layer = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D),
             "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
             "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,),
              "lm_head.weight": (V, D)}
    for i in range(MODEL["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.02 * torch.randn(shape, generator=generator) if len(shape) == 2
               else torch.ones(shape) for name, shape in shapes.items()}      # norms start at one
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = MODEL | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_adapter(folder: Path) -> None:
    """A fresh adapter in PEFT's format: random A, B = 0. Shared, or losses part at step two."""
    import torch
    from safetensors.torch import save_file

    D, r, weights = MODEL["hidden_size"], LORA["r"], {}
    generator = torch.Generator().manual_seed(1)
    for i in range(MODEL["num_hidden_layers"]):
        for module in LORA["target_modules"]:
            name = f"base_model.model.model.layers.{i}.self_attn.{module}"
            # uniform in ±1/√D: what loralib's and PEFT's kaiming_uniform_(a=√5) comes to
            uniform = 2 * torch.rand(r, D, generator=generator) - 1
            weights[f"{name}.lora_A.weight"] = uniform / D ** 0.5
            weights[f"{name}.lora_B.weight"] = torch.zeros(D, r)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LORA | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def ours(folder: Path, method: str, precision: str) -> Callable[[], float]:
    """This project's training step.

    folder     holds config.json, model.safetensors, adapter/ (PEFT's format) and pairs.json
    method     "dpo" or "ulma"
    precision  "fp32" or "bf16": the frozen weights; adapters stay float32, as PEFT keeps them
    returns    a function that takes one step on all pairs and gives the loss it started from:
               mean over pairs for DPO, over responses for ULMA. The step ends with clipping to
               MAX_GRAD_NORM and AdamW(lr=LEARNING_RATE, weight_decay=0), as TRL's does.
    """
    from functools import partial

    import torch
    from lora import load_adapter
    from model import load_llama
    from step import METHODS, adapters_off, backward_batch, batch_counts
    from trees import Tree

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = load_adapter(load_llama(str(folder), dtype), str(folder / "adapter"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    trees = [Tree(pair["prompt"], [pair["chosen"], pair["rejected"]], [1.0, 0.0], [(0, 1)])
             for pair in json.loads((folder / "pairs.json").read_text())]

    def step() -> float:
        loss, *_ = backward_batch(
            model, partial(adapters_off, model), METHODS[method], trees, batch_counts(trees),
            beta=BETA, log_z=0.0, mean_logps=False, reduction="mean", micro_tokens=MICRO_TOKENS)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)
    return step


def force_compact_head() -> None:
    """Let TRL's LM head see response tokens only, on a CPU too.

    TRL 1.16 decides this in trl/trainer/utils.py, `compact = _use_triton(hidden_states.device)`.
    The name is replaced in that module alone: the one in trl/kernels/chunked_logprob.py also
    chooses between Triton and torch for the tiles and has to go on saying torch here.
    """
    import trl.trainer.utils

    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise RuntimeError(f"TRL {metadata.version('trl')} has no trl.trainer.utils._use_triton; "
                           "the head can be forced for TRL 1.16 only")
    trl.trainer.utils._use_triton = lambda device: True


def trl(folder: Path, compact: bool, precision: str) -> Callable[[], float]:
    """TRL's training step: DPOTrainer's defaults, but for what a CPU and equal tokens ask for.

    folder, precision, returns as in `ours`; compact: LM head on response tokens only.
    """
    from datasets import Dataset
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    if compact:
        force_compact_head()

    class StepwiseTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset              # TRL 1.16 would tokenize text and append an EOS of its own

        def _inner_training_loop(self, **_):
            # train() has switched checkpointing on and would now run all steps; `step` runs one.
            self.current_gradient_accumulation_steps = 1
            self.wrapped, self.batches = self._prepare_for_training(
                self.args.max_steps, self.get_train_dataloader(), None)

    pairs = json.loads((folder / "pairs.json").read_text())
    args = DPOConfig(
        output_dir=str(folder / f"trl-{compact}-{precision}"), use_cpu=True, beta=BETA,
        per_device_train_batch_size=len(pairs), max_steps=1_000_000,
        max_length=None,                                          # 1024 would cut what we do not
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM,
        bf16=precision == "bf16",                       # autocast, TRL's default; fp32 without it
        model_init_kwargs={"dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision]})
    # DPOTrainer wants a tokenizer, for its pad id only: EOS, as TRL chooses for Llama
    words = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>",
                                        bos_token="<s>", eos_token="</s>")
    trainer = StepwiseTrainer(
        model=str(folder), args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{f"{k}_ids": ids for k, ids in p.items()} for p in pairs]),
        peft_config=LoraConfig.from_pretrained(folder / "adapter"))
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(folder / "adapter")))
    trainer.train()

    def step() -> float:                                     # Trainer._run_epoch, without logging
        inputs = next(iter(trainer.batches))                 # one batch is the whole data set
        loss = trainer.training_step(trainer.wrapped, inputs)
        trainer._clip_grad_norm(trainer.wrapped)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.wrapped.zero_grad()
        return loss.item()
    return step


def peak_gb() -> float:
    """The most memory this process ever had resident, 1e9 bytes; libraries and weights included."""
    unit = 1 if sys.platform == "darwin" else 1024                   # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def work(name: str, precision: str, folder: Path, threads: int) -> None:
    """Take one step per line on stdin; answer with one JSON line each, and the peak at the end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                                    # what libraries print must not look like one
    import torch

    torch.set_num_threads(threads)
    if name.startswith("ours-"):
        step = ours(folder, name.removeprefix("ours-"), precision)
    else:
        step = trl(folder, name == "trl-compact", precision)
    print(json.dumps({"loaded_gb": peak_gb()}), file=answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise FloatingPointError(f"{name} {precision}: loss {loss}")
        print(json.dumps({"loss": loss, "seconds": seconds}), file=answers)
    print(json.dumps({"peak_gb": peak_gb()}), file=answers)


def spawn(name: str, precision: str, folder: Path) -> subprocess.Popen:
    """This script again, as one worker; the last flag of a kind wins."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name,
               "--precision", precision, "--folder", str(folder)]
    # offline also keeps DPOTrainer from reporting its use; the warnings are TRL's and transformers'
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            bufsize=1, env=os.environ | settings)


def answer(process: subprocess.Popen, name: str) -> dict:
    """The worker's next JSON line. Raises RuntimeError if it died; its own words are on stderr."""
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"worker {name} ended without an answer, exit code {process.wait()}")
    return json.loads(line)


def measure(names: list[str], precision: str, folder: Path, repeats: int) -> list[dict]:
    """One row per implementation; the first round warms up: its loss counts, its time does not."""
    rows, workers = [], {}
    try:
        for name in names:
            workers[name] = spawn(name, precision, folder)
            rows.append({"implementation": name, "precision": precision, "losses": [],
                         "seconds": [], **answer(workers[name], name)})
        for _ in range(1 + repeats):
            for row in rows:
                name = row["implementation"]
                workers[name].stdin.write("step\n")
                step = answer(workers[name], name)
                row["losses"].append(step["loss"])
                row["seconds"].append(step["seconds"])
                print(f"{precision} {name:12} {step['seconds']:8.2f} s   loss {step['loss']:.6f}",
                      file=sys.stderr)
        for row in rows:
            worker = workers[row["implementation"]]
            worker.stdin.close()                                      # nothing more to do: report
            row |= answer(worker, row["implementation"])
            row["median_seconds"] = statistics.median(row["seconds"][1:])
    finally:
        for worker in workers.values():
            worker.kill()                                             # no effect on one that ended
            worker.wait()
    return rows


def table(rows: list[dict]) -> str:
    """Markdown; the ratio is to our DPO step in the same precision."""
    ours_dpo = {row["precision"]: row["median_seconds"] for row in rows
                if row["implementation"] == "ours-dpo"}
    lines = ["| implementation | precision | s/step | min-max | x ours-dpo | peak GB | losses |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        seconds, anchor = row["seconds"][1:], ours_dpo.get(row["precision"])
        ratio = f"{row['median_seconds'] / anchor:.2f}" if anchor else "-"
        losses = " ".join(f"{loss:.5f}" for loss in row["losses"])
        lines.append(f"| {row['implementation']} | {row['precision']} "
                     f"| {row['median_seconds']:.2f} | {min(seconds):.2f}-{max(seconds):.2f} "
                     f"| {ratio} | {row['peak_gb']:.2f} | {losses} |")
    return "\n".join(lines)


def environment() -> dict:
    """What the numbers depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")                                                # Linux only
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    return {"cpu": model[1] if model else platform.processor(), "cores": os.cpu_count(),
            "bf16_instructions": sorted(set(re.findall(r"avx512_bf16|amx_bf16", text))),
            "load_before": os.getloadavg()[0], "python": platform.python_version(),
            **{package: metadata.version(package)
               for package in ("torch", "trl", "peft", "transformers", "accelerate")}}


def token_counts(pairs: list[dict]) -> dict:
    """Tokens a step handles: with one prompt per pair, one per response, and in a padded batch."""
    lengths = [(len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])) for pair in pairs]
    prompt, response = sum(p for p, _, _ in lengths), sum(c + r for _, c, r in lengths)
    return {"response": response, "shared_prompt": prompt + response,
            "unpadded": 2 * prompt + response,
            "padded": 2 * len(pairs) * max(p + max(c, r) for p, c, r in lengths)}


def compare(args: argparse.Namespace) -> None:
    """Measure what was asked for, write the JSON, print the table, check that losses agree."""
    words = [Path(word).name for word in sys.argv]       # names; where the files lie is private
    report = {"command": " ".join(["python bench/step.py", *words[1:]]),
              "threads": args.threads, **environment()}
    rows, differences = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if spawn("inputs", args.precision[0], folder).wait() != 0:
            raise SystemExit("bench/step.py: the inputs could not be made, see above")
        report["tokens"] = token_counts(json.loads((folder / "pairs.json").read_text()))
        for precision in args.precision:         # not side by side: TRL alone takes several GB
            rows += measure(args.only, precision, folder, args.repeats)
            dpo = [row["losses"] for row in rows
                   if row["precision"] == precision and row["implementation"] != "ours-ulma"]
            differences[precision] = max((abs(other / first - 1) for losses in dpo[1:]
                                          for first, other in zip(dpo[0], losses)), default=0.0)
    report |= {"largest_relative_difference_of_dpo_losses": differences, "results": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(f"{key}: {value}" for key, value in report.items() if key != "results"))
    print(table(rows))
    if differences.get("fp32", 0.0) > 1e-4:      # bf16 rounds differently in every implementation
        raise SystemExit("bench/step.py: the fp32 DPO losses disagree; the times mean nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", required=True, help="HH file, .jsonl.gz")
    parser.add_argument("--tokenizer", required=True, help="Llama's SentencePiece model")
    parser.add_argument("--pairs", type=int, default=8, help="preference pairs in a step")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after one untimed")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of a worker")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS,
                        help="implementations to run")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS,
                        help="dtypes of the frozen weights")
    parser.add_argument("--out", type=Path, default=Path("bench/results/step.json"),
                        help="every timing and loss, JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)           # what `spawn` starts
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.worker and not args.worker.startswith("trl"):
        # not for TRL: transformers has uses for a package called kernels, and ours is another
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if args.worker == "inputs":
        pairs = hh_pairs(args.dataset, args.tokenizer, args.pairs)
        (args.folder / "pairs.json").write_text(json.dumps(pairs))
        write_checkpoint(args.folder)
        write_adapter(args.folder / "adapter")
    elif args.worker:
        work(args.worker, args.precision[0], args.folder, args.threads)
    else:
        compare(args)


if __name__ == "__main__":
    main()
