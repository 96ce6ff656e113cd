"""TRL's DPO step for bench/step.py: DPOTrainer's own micro-batches, loss, backward and optimizer.

    trl          as it comes: random micro-batches of 8 pairs, gradient checkpointing, bf16 autocast
                 (but not its default of float32 weights under that: frozen weights cast at every
                 use would cost it 9 ms a pass at 7B, and winning by that would be unfair)
    trl-compact  the same with its LM head held to response tokens, as TRL does on a GPU anyway
    trl-tuned    compact; micro-batches of pairs of like length, no checkpointing, and on a GPU
                 Liger's layer kernels where installed (rotary, RMSNorm, SwiGLU; TRL 1.16 refuses
                 its loss)

This file reaches into TRL 1.16, see `force_compact_head` and StepwiseTrainer.
"""
import json
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

from task import (BETA, DTYPES, LEARNING_RATE, LORA_ALPHA, LORA_R, LORA_TARGETS, MAX_GRAD_NORM,
                  SIZES, random_weights_)

NEEDS = ("trl", "peft", "transformers", "accelerate")
TRL = {"trl": {}, "trl-compact": {},                                   # DPOConfig's arguments
       "trl-tuned": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length",
                     "remove_unused_columns": False}}              # or `length` would be one


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


def liger_layers(device: str) -> str:
    """Put Liger's kernels into transformers' Llama layers; says what was done."""
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


def hf_model(size: str, precision: str, device: str):
    """transformers' Llama of that shape; what its weights are comes later."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SIZES[size], max_position_embeddings=4096, rms_norm_eps=1e-5,
                         rope_theta=10000.0, tie_word_embeddings=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[precision]))


def trainer_of(model, pairs: list[dict], args):
    """A DPOTrainer whose train() only prepares: `wrapped` and `batches` are then ready."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOTrainer

    class StepwiseTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset              # TRL 1.16 would tokenize text and append an EOS of its own

        def _inner_training_loop(self, **_):
            # train() has switched checkpointing on and would now run all steps; `step` runs one.
            self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
            self.wrapped, self.batches = self._prepare_for_training(
                self.args.max_steps, self.get_train_dataloader(), None)

    # DPOTrainer wants a tokenizer, for its pad id only: EOS, as TRL chooses for Llama
    words = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>",
                                        bos_token="<s>", eos_token="</s>")
    rows = [{f"{key}_ids": ids for key, ids in pair.items()}
            | {"length": len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))}
            for pair in pairs]
    trainer = StepwiseTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=LORA_R, lora_alpha=LORA_ALPHA,
                               lora_dropout=0.0, target_modules=list(LORA_TARGETS)))
    random_weights_(trainer.model)
    trainer.train()
    return trainer


def trl_step(folder: Path, name: str, size: str, precision: str, device: str,
             micro_pairs: int) -> tuple[Callable[[], float], dict]:
    """TRL's training step on all pairs, as many micro-batches as that takes.

    folder       holds pairs.json; TRL's output goes there
    name         a row of TRL
    micro_pairs  pairs in a forward pass; the pairs of a step are a multiple of it
    returns      a function that takes one step and gives the loss it started from, the mean over
                 pairs; and what the result should say about it
    """
    from trl import DPOConfig

    pairs, said = json.loads((folder / "pairs.json").read_text()), {"micro_pairs": micro_pairs}
    if name != "trl" and device == "cpu":
        force_compact_head()
    if name == "trl-tuned":
        said["liger"] = liger_layers(device)
    args = DPOConfig(
        output_dir=str(folder / f"{name}-{precision}"), use_cpu=device == "cpu", beta=BETA,
        per_device_train_batch_size=micro_pairs, max_steps=1_000_000,
        gradient_accumulation_steps=len(pairs) // micro_pairs,
        max_length=None,                                          # 1024 would cut what we do not
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=MAX_GRAD_NORM,
        bf16=precision == "bf16",                       # autocast, TRL's default; fp32 without it
        **TRL[name])
    trainer = trainer_of(hf_model(size, precision, device), pairs, args)

    def step() -> float:                                     # Trainer._run_epoch, without logging
        loss = 0.0
        for inputs in trainer.batches:                       # an epoch is all pairs: one step
            loss += trainer.training_step(trainer.wrapped, inputs)
        trainer._clip_grad_norm(trainer.wrapped)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.wrapped.zero_grad()
        return loss.item()
    return step, said
