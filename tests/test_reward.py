"""Reward models: where the reward is read, what is saved, and whole runs through train and eval."""
import json
import math
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from conftest import QUIET, ROOT, write_jsonl
from torch.testing import assert_close

import eval as evaluate
import judge
from data import Tokenizer, encode_dialogue
from eval import agreement
from lora import load_adapter, save_adapter
from model import load_llama
from reward import add_score_head, feed_last_tokens, load_reward_model, stream_rewards, tree_rewards
from test_step import make_model, make_trees
from test_train import adapter_hash, command, finish, logged, pairs_file  # noqa: F401
from trees import Tree, build_stream


def reward_model_in(folder, base):
    """A model with random adapters and head on a Hugging Face folder, saved; returns the model."""
    from lora import add_lora
    model = add_score_head(add_lora(load_llama(base), r=4, alpha=8, dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    save_adapter(model, str(folder), base)
    return model


# ---- where the reward is read -------------------------------------------------------------------

def test_the_reward_is_the_head_at_the_last_token_of_each_response_alone():
    # Packed, shared prompts, single-token responses among them: each as one plain sequence.
    model, trees = make_model(score_head=True), make_trees()
    together = tree_rewards(model, trees, micro_tokens=64)
    alone = []
    with torch.no_grad():
        for tree in trees:
            for ids in tree.response_ids:
                hidden = model(torch.tensor(tree.prompt_ids + ids))
                alone.append(hidden[-1] @ model.score.weight[0])
    assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-9)


def test_a_cut_answer_and_a_finished_one_have_different_rewards():
    # "a b c </s>" and "a b c d", cut after d: the state after c, which predicts the last token, is
    # the same for both, and so would be a reward that is read there.
    model, prompt_ids, eos = make_model(score_head=True), [1, 5, 9], 2
    tree = Tree(prompt_ids, [[20, 21, 22, eos], [20, 21, 22, 23], [20, 21, 22]], [1.0, 0.0, 0.0],
                [])
    finished, cut, shorter = tree_rewards(model, [tree]).tolist()
    assert min(abs(finished - cut), abs(finished - shorter), abs(cut - shorter)) > 0.01
    stream = build_stream([tree])
    with torch.no_grad():
        hidden = model(stream.input_ids, stream.position_ids, stream.segments)
    before_last = (hidden[stream.predict_from] @ model.score.weight[0])[[3, 7]]
    assert_close(before_last[0], before_last[1], rtol=1e-12, atol=0)


def test_a_new_head_gives_reward_zero_and_keeps_the_adapters_dtype():
    # Zero as lora_B: the first loss is log 2. Float32 on a bfloat16 model, where a step of 1e-5
    # on a weight of 0.02 would be rounded away.
    model = add_score_head(make_model(torch.bfloat16))
    assert model.score.weight.dtype == torch.float32 and model.score.weight.requires_grad
    rewards = stream_rewards(model, build_stream(feed_last_tokens(make_trees())))
    assert rewards.dtype == torch.float32 and not rewards.any()


# ---- files --------------------------------------------------------------------------------------

def test_a_saved_reward_model_gives_the_same_rewards_and_is_refused_as_a_policy(tmp_path,
                                                                                tiny_model):
    model = reward_model_in(tmp_path / "out", tiny_model)
    trees = make_trees()
    assert torch.equal(tree_rewards(load_reward_model(str(tmp_path / "out")), trees),
                       tree_rewards(model, trees))
    with pytest.raises(ValueError, match=r"only plain LoRA is supported, not modules_to_save"):
        load_adapter(load_llama(tiny_model), str(tmp_path / "out"))


def test_a_folder_that_is_no_reward_model_is_named(tmp_path, tiny_model):
    with pytest.raises(FileNotFoundError, match="a reward model's folder has one"):
        load_reward_model(str(tmp_path))
    model = reward_model_in(tmp_path / "policy", tiny_model)
    del model.score
    save_adapter(model, str(tmp_path / "policy"), tiny_model)
    with pytest.raises(ValueError, match=r"modules_to_save is None; a reward model's is"):
        load_reward_model(str(tmp_path / "policy"))
    config = tmp_path / "policy/adapter_config.json"         # says it has a head, and has none
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["score"]}))
    with pytest.raises(ValueError, match="missing base_model.model.score.weight"):
        load_reward_model(str(tmp_path / "policy"))


def test_peft_and_transformers_give_the_same_rewards_and_save_what_we_load(tmp_path, tiny_model):
    # The logit of LlamaForSequenceClassification is at the last token too; one row at a time,
    # since without a pad token it takes no batches.
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, trees = reward_model_in(tmp_path / "ours", tiny_model), make_trees()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    rows = [tree.prompt_ids + ids for tree in trees for ids in tree.response_ids]
    with torch.no_grad():
        expected = torch.stack([theirs(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    assert expected.std() > 0.01
    assert_close(tree_rewards(model, trees), expected, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_reward_model(str(tmp_path / "theirs"), base=tiny_model)
    assert_close(tree_rewards(again, trees), expected, rtol=1e-5, atol=1e-6)


# ---- whole runs ---------------------------------------------------------------------------------

def test_a_stopped_reward_model_continues_to_the_same_bytes(tmp_path, tiny_model, pairs_file):
    # Head and its moments are in the checkpoint, and dropout (0.1) comes out the same.
    flags = ("--method", "reward_model", "--num_train_epochs", "2")
    finish(tiny_model, pairs_file, tmp_path / "whole", *flags)
    out = tmp_path / "stopped"
    process = subprocess.Popen(command(tiny_model, pairs_file, out, *flags), cwd=ROOT,
                               env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    for line in process.stdout:
        if line.startswith("step 7/"):
            process.terminate()
            break
    process.stdout.read()
    process.wait(timeout=60)
    assert not (out / "final").exists(), "the run was over before the signal came"
    finish(tiny_model, pairs_file, out, *flags)
    assert adapter_hash(out) == adapter_hash(tmp_path / "whole")
    assert logged(out) == logged(tmp_path / "whole")
    first = logged(out)[0]
    assert first["loss"] == pytest.approx(math.log(2)) and "logps/positive" not in first
    assert not (out / "final/model.safetensors").exists()
    assert load_reward_model(str(out / "final")).score.weight.abs().sum() > 0


def test_a_reward_model_learns_a_word_and_eval_says_so(tmp_path, tiny_model, pairs_file):
    # Good answers end in "yes", bad ones in "no": on prompts it never saw it must be right nearly
    # always, and length must not tell (both sides have 1 to 12 words).
    finish(tiny_model, pairs_file, tmp_path / "run", "--method", "reward_model", "--held_out",
           "0.3", "--num_train_epochs", "8", "--learning_rate", "1e-2", "--lora_dropout", "0")
    shown = conftest.finish("eval.py", tmp_path / "run")
    lines = [line for line in shown.splitlines() if "accuracy of" in line]
    accuracy, length = (float(line.split("[")[0].split()[-1]) for line in lines)
    assert "reward model" in lines[0] and accuracy > 0.9
    assert "length only" in lines[1] and 0.25 < length < 0.75
    assert logged(tmp_path / "run")[-1]["rewards/accuracies"] > 0.9


def test_pointwise_reward_models_run_and_all_weights_are_refused(tmp_path, tiny_model, pairs_file,  # noqa: F811
                                                                 capsys):
    for name in ("pointwise_reward_model", "mse_reward_model"):
        finish(tiny_model, pairs_file, tmp_path / name, "--method", name, "--max_steps", "3")
    losses = [logged(tmp_path / name)[0]["loss"]
              for name in ("pointwise_reward_model", "mse_reward_model")]
    assert losses[0] == pytest.approx(math.log(2))               # r = 0
    assert 0.3 < losses[1] < 0.7                                 # z² over z = 1 and 0: their share
    with pytest.raises(SystemExit):
        finish(tiny_model, pairs_file, tmp_path / "full", "--method", "reward_model", "--lora_r", 0)
    assert "--lora_r must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


# ---- agreement with a known reward --------------------------------------------------------------

def test_agreement_by_hand():
    # Truth 3 2 2 1, values 9 5 7 7. Five pairs differ in truth: 3>2, 3>2, 3>1 right; 2(5) > 1(7)
    # wrong; 2(7) > 1(7) half: 3.5 / 5. Ranks of truth (from 0.5) 3.5 2 2 .5, of values 3.5 .5 2 2:
    # deviations 1.5 0 0 -1.5 and 1.5 -1.5 0 0, so 2.25 / 4.5.
    truth, values = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([9.0, 5.0, 7.0, 7.0])
    assert agreement(values, truth) == pytest.approx((0.7, 0.5))
    assert agreement(truth * 2 + 1, truth) == pytest.approx((1.0, 1.0))
    assert agreement(-truth, truth) == pytest.approx((0.0, -1.0))


def test_sums_of_rewards_that_differ_in_the_last_bit_are_ties():
    # 0.1 + 0.2 > 0.3 in floating point; the world's rewards are such sums.
    truth = torch.tensor([0.1 + 0.2, 0.3, 1.0], dtype=torch.float64)
    accuracy, _ = agreement(torch.tensor([0.0, 5.0, 9.0]), truth)
    assert accuracy == 1.0                                       # the first two are no pair


def test_world_rewards_are_those_of_each_answer(tiny_model, tmp_path, capsys):
    # The table's rows line up with `answers`: a head that reads a constant is half right.
    from data import Tokenizer
    from eval import evaluate_world_rewards, world_trees
    from world import held_out_prompts
    model, tokenizer = reward_model_in(tmp_path / "out", tiny_model), Tokenizer(tiny_model)
    asked = held_out_prompts()[:2]
    rewards = tree_rewards(model, world_trees(tokenizer, asked))
    assert rewards.shape == (2 * 288,) and rewards.unique().numel() > 500
    torch.nn.init.zeros_(model.score.weight)
    evaluate_world_rewards(model, tokenizer, asked)
    assert "accuracy of the reward model  0.500 [0.500, 0.500]" in capsys.readouterr().out


def test_a_reward_model_judges_generations(tmp_path, tiny_model, pairs_file, monkeypatch, capsys):
    # eval.py judge: prompts -> rewards -> score. Each answer's reward is that of tree_rewards on
    # its own, and the shares follow from their signs. A reward model has no tokens to colour.
    monkeypatch.chdir(tmp_path)
    finish(tiny_model, pairs_file, tmp_path / "rm", "--method", "reward_model", "--max_steps", "2",
           "--learning_rate", "0.05")
    rows = [{"prompt": [["Human", f"{n} lamps?"]], "completion": text, "seed": n}
            for n, text in enumerate(("Every letter.", "A red boat.", "It."))]
    mine, against = (write_jsonl(tmp_path / name, rows_of) for name, rows_of in (
        ("mine.jsonl", rows), ("other.jsonl", [row | {"completion": "Two!"} for row in rows])))
    judge.main(["prompts", mine, "--against", against, "--out", "asked.jsonl"])
    judge.main(["rewards", "asked.jsonl", "--reward_model", "rm", "--out", "said.jsonl"])
    model, tokenizer = load_reward_model("rm/final"), Tokenizer(tiny_model)
    for row, line in zip(rows, Path("said.jsonl").read_text().splitlines(), strict=True):
        answers = [encode_dialogue(tokenizer, [*row["prompt"], ("Assistant", text)])
                   for text in (row["completion"], "Two!")]
        tree = Tree(answers[0][0], [ids for _, ids in answers], [1.0, 0.0], [(0, 1)])
        given = json.loads(line)
        assert [given["reward_a"], given["reward_b"]] == pytest.approx(
            tree_rewards(model, [tree]).tolist(), abs=1e-5)
    judge.main(["score", "--questions", "asked.jsonl", "--answers", "said.jsonl"])
    assert "reward: 3 pairs on 3 prompts" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="said.jsonl exists"):
        judge.main(["rewards", "asked.jsonl", "--reward_model", "rm", "--out", "said.jsonl"])
    monkeypatch.setattr(sys, "argv", ["eval.py", "--heatmap", "rm", "--dataset", str(pairs_file)])
    with pytest.raises(ValueError, match="rm is a reward model; --heatmap colours"):
        evaluate.main()
    sys.argv[1:] = ["rm", "--dataset", str(pairs_file), "--json", "table.json"]
    with pytest.raises(ValueError, match="--json writes the world's table, and none of these"):
        evaluate.main()
