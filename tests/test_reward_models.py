"""Reward models: where the reward is read, what is saved, whole runs, eval.py and judge/."""
import json
import math
import subprocess
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ONE_THREAD, ROOT, write_jsonl
from helpers import (adapter_hash, command, finish, logged, make_model, make_trees,
                     reward_model_in)
from torch.testing import assert_close

import eval as evaluate
import judge.__main__ as judge
from lora import add_score_head, load_adapter, save_adapter
from model import load_llama
from packing import Tree, build_stream
from step import feed_last_tokens, stream_rewards, tree_rewards
from tokenizer import Tokenizer, encode_dialogue
from tools import heatmap
from training.checkpoint import load_run


def load_reward_adapter(folder, base):
    return load_adapter(add_score_head(load_llama(base)), str(folder))


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
    # the same for both, so a reward that is read there would be the same too.
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


def test_a_new_head_is_float32_and_gives_reward_zero():
    # Zero, like lora_B: the first loss is log 2. In bfloat16 a step of 1e-5 on a weight of 0.02
    # would be rounded away.
    model = add_score_head(make_model(torch.bfloat16))
    assert model.score.weight.dtype == torch.float32 and model.score.weight.requires_grad
    rewards = stream_rewards(model, build_stream(feed_last_tokens(make_trees())))
    assert rewards.dtype == torch.float32 and not rewards.any()


# ---- files --------------------------------------------------------------------------------------

def test_a_saved_reward_model_gives_the_same_rewards_and_is_no_policy(tmp_path, tiny_model):
    model, trees = reward_model_in(tmp_path, tiny_model), make_trees()
    assert torch.equal(tree_rewards(load_reward_adapter(tmp_path, tiny_model), trees),
                       tree_rewards(model, trees))
    with pytest.raises(ValueError, match=r"only plain LoRA is supported, not modules_to_save"):
        load_adapter(load_llama(tiny_model), str(tmp_path))


def test_a_folder_without_a_head_is_refused(tmp_path, tiny_model):
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file"):
        load_reward_adapter(tmp_path, tiny_model)
    model = reward_model_in(tmp_path / "policy", tiny_model)
    del model.score
    save_adapter(model, str(tmp_path / "policy"), tiny_model)
    file = tmp_path / "policy/adapter_config.json"
    config = json.loads(file.read_text())
    assert config["modules_to_save"] is None
    for modules in (None, ["score"]):                       # a policy; a head that is not there
        file.write_text(json.dumps(config | {"modules_to_save": modules}))
        with pytest.raises(ValueError, match="missing base_model.model.score.weight"):
            load_reward_adapter(tmp_path / "policy", tiny_model)


# ---- whole runs ---------------------------------------------------------------------------------

def test_a_stopped_reward_model_continues_to_the_same_bytes(tmp_path, tiny_model, pairs_file):
    # The checkpoint holds the head and its moments; dropout (0.1) has the same masks.
    flags = ("--method", "reward_model", "--num_train_epochs", "2")
    finish(tiny_model, pairs_file, tmp_path / "whole", *flags)
    out = tmp_path / "stopped"
    process = subprocess.Popen(command(tiny_model, pairs_file, out, *flags), cwd=ROOT,
                               env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
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
    assert load_run(str(out)).model.score.weight.abs().sum() > 0


def test_a_reward_model_learns_a_word_and_eval_measures_it(tmp_path, tiny_model, pairs_file):
    # Good answers end in "yes", bad ones in "no": on prompts never trained on it must be right
    # nearly always, and length must not help (both sides have 1 to 12 words).
    finish(tiny_model, pairs_file, tmp_path / "run", "--method", "reward_model", "--held_out",
           "0.3", "--num_train_epochs", "8", "--learning_rate", "1e-2")
    shown = conftest.finish("eval.py", tmp_path / "run")
    lines = [line for line in shown.splitlines() if "accuracy of" in line]
    accuracy, length = (float(line.split("[")[0].split()[-1]) for line in lines)
    assert "reward model" in lines[0] and accuracy > 0.9
    assert "length only" in lines[1] and 0.25 < length < 0.75
    assert logged(tmp_path / "run")[-1]["rewards/accuracies"] > 0.9


def test_pointwise_reward_models_run_and_all_weights_are_refused(tmp_path, tiny_model, pairs_file):
    for name in ("pointwise_reward_model", "mse_reward_model"):
        finish(tiny_model, pairs_file, tmp_path / name, "--method", name, "--max_steps", "3")
    losses = [logged(tmp_path / name)[0]["loss"]
              for name in ("pointwise_reward_model", "mse_reward_model")]
    assert losses[0] == pytest.approx(math.log(2))               # r = 0
    assert 0.3 < losses[1] < 0.7                                 # the mean of z², z being 1 or 0
    with pytest.raises(ValueError, match="--lora_r must be at least 1"):
        finish(tiny_model, pairs_file, tmp_path / "full", "--method", "reward_model", "--lora_r", 0)
    assert not (tmp_path / "full").exists()


def test_a_reward_model_judges_generations(tmp_path, tiny_model, pairs_file, monkeypatch, capsys):
    # Each answer's reward is that of tree_rewards on its own. A reward model has no table of the
    # world either.
    monkeypatch.chdir(tmp_path)
    finish(tiny_model, pairs_file, tmp_path / "rm", "--method", "reward_model", "--max_steps", "2",
           "--learning_rate", "0.05")
    rows = [{"prompt": [["Human", f"{n} lamps?"]], "completion": text, "seed": n}
            for n, text in enumerate(("Every letter.", "A red boat.", "It."))]
    mine, against = (write_jsonl(tmp_path / name, rows_of) for name, rows_of in (
        ("mine.jsonl", rows), ("other.jsonl", [row | {"completion": "Two!"} for row in rows])))
    judge.main(["prompts", mine, "--against", against, "--out", "questions.jsonl"])
    rewards = ["rewards", "questions.jsonl", "--reward_model", "rm", "--out", "answers.jsonl"]
    judge.main(rewards)
    model, tokenizer = load_run("rm").model, Tokenizer(tiny_model)
    lines = Path("answers.jsonl").read_text().splitlines()
    for row, line in zip(rows, lines, strict=True):
        answers = [encode_dialogue(tokenizer, [*row["prompt"], ("Assistant", text)])
                   for text in (row["completion"], "Two!")]
        tree = Tree(answers[0][0], [ids for _, ids in answers], [1.0, 0.0], [(0, 1)])
        given = json.loads(line)
        assert [given["reward_a"], given["reward_b"]] == pytest.approx(
            tree_rewards(model, [tree]).tolist(), abs=1e-5)
    judge.main(["score", "--questions", "questions.jsonl", "--answers", "answers.jsonl"])
    assert "reward: 3 pairs on 3 prompts" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="answers.jsonl exists"):
        judge.main(rewards)
    with pytest.raises(ValueError, match="--json writes the world's table, and none of these"):
        evaluate.main(["rm", "--dataset", str(pairs_file), "--json", "table.json"])
    with pytest.raises(ValueError, match="rm is a reward model; a heat map needs a policy"):
        heatmap.main(["rm", "--dataset", str(pairs_file)])
