"""TRL's DPO step for bench/step.py: DPOTrainer's own micro-batches, loss, backward and optimizer.

    trl          as it comes: random micro-batches of 8 pairs, gradient checkpointing, bf16 autocast
                 (but not its default of float32 weights under autocast: casting frozen weights at
                 every use would cost it 9 ms a pass at 7B, an unfair disadvantage)
    trl-compact  the same with its LM head applied to response tokens only, as TRL does on a GPU
    trl-tuned    compact; micro-batches of pairs of similar length, no checkpointing, and on a GPU
                 Liger's layer kernels where installed (rotary, RMSNorm, SwiGLU; TRL 1.16 refuses
                 its loss)

This file uses internals of TRL 1.16, see `force_compact_head` and StepwiseTrainer.
"""
import json
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import task

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import DPOConfig, DPOTrainer

NEEDS = ("trl", "peft", "transformers", "accelerate")
TRL = {       # implementation: arguments of DPOConfig
    "trl": {}, "trl-compact": {},
    "trl-tuned": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length",
                  "remove_unused_columns": False}}       # or the column `length` would go


def force_compact_head() -> None:
    """Make TRL apply its LM head to response tokens only, on a CPU too.

    TRL 1.16 decides this in trl/trainer/utils.py, `compact = _use_triton(hidden_states.device)`.
    The name is replaced in that module alone: the one in trl/kernels/chunked_logprob.py also
    chooses between Triton and torch for the tiles, and torch is right here.
    """
    import trl.trainer.utils

    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise RuntimeError(f"TRL {metadata.version('trl')} has no trl.trainer.utils._use_triton; "
                           "the head can be forced for TRL 1.16 only")
    trl.trainer.utils._use_triton = lambda device: True


def liger_layers(device: str) -> str:
    """Put Liger's kernels into transformers' Llama layers; returns a note on what was done."""
    if util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    version = f"liger-kernel {metadata.version('liger-kernel')}"
    if device != "cuda":
        return f"{version} not used: its kernels need a GPU"
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        return f"{version} not used: {error}"
    apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, cross_entropy=False,
                                fused_linear_cross_entropy=False)
    return f"{version}: rotary, RMSNorm, SwiGLU"


def hf_model(size: str, precision: str, device: str) -> "PreTrainedModel":
    """transformers' Llama of that shape; its weights are filled in later."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**task.SIZES[size], max_position_embeddings=4096, rms_norm_eps=1e-5,
                         rope_theta=10000.0, tie_word_embeddings=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, task.DTYPES[precision]))


def make_trainer(model: "PreTrainedModel", pairs: list[dict], args: "DPOConfig") -> "DPOTrainer":
    """A DPOTrainer with an adapter, prepared to take steps on its `wrapped` and `batches`."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOTrainer

    class StepwiseTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset              # TRL 1.16 would tokenize text and append an EOS of its own

        def _inner_training_loop(self, **_):
            # train() has switched checkpointing on and would now run all steps; trl_step runs one
            # at a time on what is prepared here.
            self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
            self.wrapped, self.batches = self._prepare_for_training(
                self.args.max_steps, self.get_train_dataloader(), None)

    # DPOTrainer needs a tokenizer for its pad id only: EOS, as TRL chooses for Llama
    words = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>",
                                        bos_token="<s>", eos_token="</s>")
    rows = [{f"{key}_ids": ids for key, ids in pair.items()}
            | {"length": len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))}
            for pair in pairs]
    trainer = StepwiseTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=task.LORA_R, lora_alpha=task.LORA_ALPHA,
                               lora_dropout=0.0, target_modules=list(task.LORA_TARGETS)))
    task.random_weights_(trainer.model)
    trainer.train()
    return trainer


def trl_step(folder: Path, name: str, size: str, precision: str, device: str,
             micro_pairs: int) -> tuple[Callable[[], float], dict]:
    """TRL's training step on all pairs, as many micro-batches as that takes.

    folder       holds pairs.json; TRL's output goes there
    name         a row of TRL
    micro_pairs  pairs in a forward pass; the pairs of a step are a multiple of it
    returns      a function that takes one step and gives the loss it started from, the mean over
                 pairs; and notes for the result
    """
    from trl import DPOConfig

    pairs, notes = json.loads((folder / "pairs.json").read_text()), {"micro_pairs": micro_pairs}
    if name != "trl" and device == "cpu":
        force_compact_head()
    if name == "trl-tuned":
        notes["liger"] = liger_layers(device)
    args = DPOConfig(
        output_dir=str(folder / f"{name}-{precision}"), use_cpu=device == "cpu", beta=task.BETA,
        per_device_train_batch_size=micro_pairs, max_steps=1_000_000,
        gradient_accumulation_steps=len(pairs) // micro_pairs,
        max_length=None,                                   # the default of 1024 would cut pairs
        learning_rate=task.LEARNING_RATE, lr_scheduler_type="constant",
        max_grad_norm=task.MAX_GRAD_NORM,
        bf16=precision == "bf16",                       # autocast, TRL's default; fp32 without it
        **TRL[name])
    trainer = make_trainer(hf_model(size, precision, device), pairs, args)

    def step() -> float:                                     # Trainer._run_epoch, without logging
        loss = 0.0
        for inputs in trainer.batches:                       # an epoch is all pairs: one step
            loss += trainer.training_step(trainer.wrapped, inputs)
        trainer._clip_grad_norm(trainer.wrapped)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.wrapped.zero_grad()
        return loss.item()
    return step, notes
