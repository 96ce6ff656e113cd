"""Whole training runs against TRL 1.16 + PEFT: the same pairs in the same order from the same
adapter, through train.main here and TRL's own trainer there, must log the same numbers.
"""
import json
import random

import pytest
import torch
from conftest import need, save_tiny_model, write_jsonl

import train
from lora import save_adapter
from step import METHODS
from training import setup
from training.ranks import Ranks
from training.setup import set_up

trl, peft = need("trl"), need("peft")
datasets, transformers = need("datasets"), need("transformers")

STEPS, PAIRS, RATE = 20, 4, 1e-2                 # PAIRS of them in each step


@pytest.fixture(autouse=True)
def plain_settings(monkeypatch):
    """A gradient norm that is always clipped to, and no dropout."""
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 0.5)
    monkeypatch.setattr(setup, "LORA_DROPOUT", 0.0)


def ours(folder, tiny_tokenizer, *flags):
    """A run of train.main: (its log lines, its trees in the order of training, its model folder).

    The adapter it starts from is left in folder/adapter, in PEFT's format. Chosen responses have
    the same number of tokens each, rejected ones have not.
    """
    model, rng = save_tiny_model(folder / "model", tiny_tokenizer), random.Random(0)
    words = "the a cat dog sat ran on under mat hill".split()
    rows = [{"prompt": " ".join(rng.choices(words, k=rng.randint(1, 6))) + f" {n}",
             "chosen": f"It costs {rng.randint(100, 999)}.",
             "rejected": " ".join(rng.choices(words, k=rng.randint(1, 6)))}
            for n in range(STEPS * PAIRS)]
    argv = ["--model_name_or_path", model, "--dataset", write_jsonl(folder / "pairs.jsonl", rows),
            "--output_dir", str(folder / "run"), "--learning_rate", str(RATE), "--logging_steps",
            "1", "--lora_r", "4", "--lora_alpha", "16", "--lora_target_modules",
            "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", *flags]
    start = set_up(train.parse_args(argv), METHODS, Ranks(), torch.device("cpu"))
    assert [len(batch) for batch in start.batches] == [PAIRS] * STEPS
    save_adapter(start.model, str(folder / "adapter"))
    train.main(argv)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return lines, [start.trees[i] for batch in start.batches for i in batch], model


def theirs(trainer_class, config, rows, model, folder):
    """A run of TRL's trainer on rows of token ids, as they come: its log, losses not rounded."""
    class Recording(trainer_class):
        losses = []

        def _prepare_dataset(self, dataset, *_):
            return dataset               # token ids already; TRL would add an EOS of its own

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            self.losses.append(super().training_step(*args, **kwargs))
            return self.losses[-1]

    from tokenizers import Tokenizer, models
    words = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(          # for its pad id only
        tokenizer_object=Tokenizer(words), unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    lora = peft.LoraConfig.from_pretrained(str(folder / "adapter"))
    lora.inference_mode = False                  # as saved, it is frozen
    trainer = Recording(model=model, args=config, processing_class=tokenizer, peft_config=lora,
                        train_dataset=datasets.Dataset.from_list(rows))
    peft.set_peft_model_state_dict(trainer.model, peft.load_peft_weights(str(folder / "adapter")))
    trainer.train()
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [line | {"loss": loss.item()} for line, loss in zip(log, Recording.losses, strict=True)]


def settings(folder, **more):
    return {"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "max_steps": STEPS,
            "per_device_train_batch_size": PAIRS, "max_length": None, "learning_rate": RATE,
            "lr_scheduler_type": "cosine", "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "float32"}} | more


def assert_same(expected, lines, names, scale=1.0):
    """Every step: theirs = scale · ours to 1e-4; rewards cross 0: to 1e-4 of the run's largest."""
    assert len(expected) == len(lines) == STEPS
    for name, our_name in names.items():
        factor = scale if name in ("loss", "grad_norm") else 1.0
        largest = max(abs(line[name]) for line in expected) if name in REWARDS else 0.0
        for step, (their, our) in enumerate(zip(expected, lines)):
            assert their[name] == pytest.approx(factor * our[our_name], rel=1e-4,
                                                abs=1e-4 * largest), (step, name)


REWARDS = {"rewards/chosen": "rewards/positive", "rewards/rejected": "rewards/negative"}


def dpo_rows(trees):
    return [{"prompt_ids": tree.prompt_ids, "chosen_ids": tree.response_ids[tree.pairs[0][0]],
             "rejected_ids": tree.response_ids[tree.pairs[0][1]]} for tree in trees]


def test_dpo_is_that_of_trl_step_by_step(tmp_path, tiny_tokenizer):
    # 20 steps of AdamW on a cosine, clipped: an error of the loss, the mask, the reference, the
    # schedule or the optimizer shows in some number of some step.
    lines, trees, model = ours(tmp_path, tiny_tokenizer, "--method", "dpo", "--batch_size",
                               str(PAIRS))
    config = trl.DPOConfig(beta=0.1, max_grad_norm=0.5, **settings(tmp_path))
    log = theirs(trl.DPOTrainer, config, dpo_rows(trees), model, tmp_path)
    assert lines[-1]["loss"] < 0.6 < 0.69 < lines[0]["loss"]            # it learned
    assert_same(log, lines, {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr",
                             **REWARDS})


def test_pointwise_dpo_on_pairs_is_trls_bco_pair(tmp_path, tiny_tokenizer, monkeypatch):
    # They average over pairs the sum of a pair's two losses, we over responses: twice ours, and so
    # is the gradient, with the norm it is clipped to and the epsilon it meets in AdamW.
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 0.25)
    lines, trees, model = ours(tmp_path, tiny_tokenizer, "--method", "pointwise_dpo",
                               "--batch_size", str(2 * PAIRS))
    config = trl.DPOConfig(beta=0.1, loss_type="bco_pair", max_grad_norm=0.5,
                           **settings(tmp_path, adam_epsilon=2e-8))
    log = theirs(trl.DPOTrainer, config, dpo_rows(trees), model, tmp_path)
    assert_same(log, lines, {"loss": "loss", "grad_norm": "grad_norm", **REWARDS}, scale=2.0)


def test_kto_is_that_of_trl_step_by_step(tmp_path, tiny_tokenizer):
    # z0 of every batch from the same mismatched responses: each prompt with the two of the prompt
    # before it. It is above 0 in most steps, so an error of it would show in the loss.
    lines, trees, model = ours(tmp_path, tiny_tokenizer, "--method", "kto", "--batch_size",
                               str(2 * PAIRS))
    rows = [{"prompt_ids": tree.prompt_ids, "completion_ids": tree.response_ids[k],
             "KL_completion_ids": trees[n - n % PAIRS + (n - 1) % PAIRS].response_ids[k],
             "label": tree.scores[k] == 1} for n, tree in enumerate(trees) for k in (0, 1)]
    config = trl.KTOConfig(beta=0.1, max_grad_norm=0.5, train_sampling_strategy="sequential",
                           **settings(tmp_path, per_device_train_batch_size=2 * PAIRS))
    log = theirs(trl.KTOTrainer, config, rows, model, tmp_path)
    assert sum(line["kl"] > 0.1 for line in log) >= 5
    assert lines[-1]["loss"] < 0.45 < 0.49 < lines[0]["loss"]           # it learned
    assert_same(log, lines, {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr",
                             **REWARDS})


def test_ipo_with_length_averages_is_trls(tmp_path, tiny_tokenizer):
    # TRL averages over length; so do we when asked, then also in the logged rewards (theirs: sums).
    lines, trees, model = ours(tmp_path, tiny_tokenizer, "--method", "ipo", "--batch_size",
                               str(PAIRS), "--reduction", "tokens")
    config = trl.DPOConfig(beta=0.1, loss_type="ipo", max_grad_norm=0.5, **settings(tmp_path))
    log = theirs(trl.DPOTrainer, config, dpo_rows(trees), model, tmp_path)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert_same(log, lines, {"loss": "loss", "grad_norm": "grad_norm"})


def test_sft_is_trls_with_responses_of_one_length(tmp_path, tiny_tokenizer):
    # They average over the tokens of a batch, we over responses the sum (papers) or the average
    # (--reduction tokens) of each. For responses of one length the last is the first.
    lines, trees, model = ours(tmp_path, tiny_tokenizer, "--method", "sft", "--batch_size",
                               str(PAIRS), "--reduction", "tokens")
    assert len({len(ids) for tree in trees for ids in tree.response_ids}) == 1
    rows = [{"input_ids": tree.prompt_ids + tree.response_ids[0],
             "labels": [-100] * len(tree.prompt_ids) + tree.response_ids[0]} for tree in trees]
    config = trl.SFTConfig(max_grad_norm=0.5, **settings(tmp_path))
    log = theirs(trl.SFTTrainer, config, rows, model, tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert_same(log, lines, {"loss": "loss", "grad_norm": "grad_norm"})
