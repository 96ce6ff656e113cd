"""study/runs.py and tables.py: exact scores by hand, commands, runs that are not done twice."""
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import study.datasets as datasets
import study.runs as runs
import train
from files.fingerprint import weights_of
from files.lock import locked
from rlhf import ppo
from study.claims import PAPER_CLAIMS, PRIMARY, QUESTIONS
from study.datasets import DATASETS
from study.rows import TUNING_SEEDS
from study.runs import Cell, Run, arguments, execute
from study.statistics import on_path
from study.tables import TABLES
from training.checkpoint import FinishedRun
from world import BAD_VERBS, answers, training_prompts

# ---- scores -------------------------------------------------------------------------------------

def test_win_tie_lose_by_hand():
    # Rewards 2 1 1; p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): win 1/2 · 3/4, tie 1/2 · 1/4 on the
    # first and 1/2 · 3/4 on the others, lose 1/2 · 1/4.
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    scores = runs.win_tie_lose(p, q, torch.tensor([2.0, 1.0, 1.0]), "x")
    assert scores == pytest.approx({"win/x": 0.375, "tie/x": 0.5, "lose/x": 0.125})


def test_the_chosen_answer_is_distributed_as_draws_say():
    # Of two draws a, b the first is chosen with sigma(r_a - r_b): summed over both orders. HH-like
    # pairs draw b again until it differs from a.
    prompt = training_prompts()[0]
    rewards = torch.tensor([r for _, r, *_ in answers(*prompt)], dtype=torch.float64)
    habits = torch.tensor([w for *_, w in answers(*prompt)], dtype=torch.float64)
    for data in ("qa", "hh"):
        expected = torch.zeros(288, dtype=torch.float64)
        for a in range(288):
            second = habits.clone()
            if data == "hh":
                second[a] = 0
                second /= second.sum()
            first = torch.sigmoid(rewards[a] - rewards)
            expected[a] += (habits[a] * second * first).sum()      # a drawn first, and chosen
            expected += habits[a] * second * (1 - first)           # a drawn first, b chosen
        probs = runs.chosen_distribution(prompt, data).exp()
        assert_close(probs[:-1], expected)
        assert float(probs.sum()) == pytest.approx(1) and float(probs[-1]) == 0
    best = runs.chosen_distribution(prompt, "golden-30").exp()
    assert int(best.argmax()) == int(rewards.argmax()) and float(best.max()) == 1


def test_prompt_scores_of_the_base_itself():
    # No log-ratio: slope 0, half of all pairs right, sigma(0) = 1/2 everywhere.
    prompt = training_prompts()[3]
    habits = torch.tensor([0.9 * w for *_, w in answers(*prompt)], dtype=torch.float64)
    scores = runs.prompt_scores(prompt, habits.log(), habits.log(), torch.full((288,), 20),
                                data="qa")
    assert scores["reward slope"] == 0 and scores["reward accuracy"] == 0.5
    assert scores["win/base"] == pytest.approx(scores["lose/base"])
    rewards = torch.tensor([r for _, r, *_ in answers(*prompt)], dtype=torch.float64)
    assert scores["calibration error"] == pytest.approx(
        float((habits / 0.9 * (torch.sigmoid(rewards) - 0.5).abs()).sum()))
    assert scores["length"] == pytest.approx(20) and scores["KL(ref||pi)"] == 0
    outside = torch.cat([habits, torch.tensor([0.1], dtype=torch.float64)])
    assert scores["entropy"] == pytest.approx(-float((outside * outside.log()).sum()))
    assert scores["E[r] inside"] == pytest.approx(float((habits / 0.9 * rewards).sum()))
    openings = [text.startswith(("Sorry", "I would")) for text, *_ in answers(*prompt)]
    assert scores["refusal"] == pytest.approx(float(habits[torch.tensor(openings)].sum()))
    # A policy that gives every valid answer e^-800, which is 0 in float64: numbers all the same.
    gone = runs.prompt_scores(prompt, torch.full((288,), -800.0, dtype=torch.float64), habits.log(),
                              torch.full((288,), 20), data="qa")
    assert gone["length"] == pytest.approx(20) and gone["off-world"] == 1
    assert gone["E[r] inside"] == pytest.approx(float(rewards.mean()))


def test_the_path_leads_from_the_base_to_the_end_and_is_dense_enough():
    # pi* itself lies at the end; between, a of the path is pi* of beta / a, found by bisection.
    prompt = training_prompts()[3]
    base = torch.tensor([0.99 * w for *_, w in answers(*prompt)], dtype=torch.float64).log()
    rewards = runs.outcome_rewards(prompt)
    best, _ = runs.optimum(runs.with_rest(base), rewards, 0.5)
    path = runs.kl_path([prompt], best[None, :-1], base[None])
    assert len(path) == 11 and path[0][0] == 0
    assert path[0][1] == pytest.approx(float(runs.with_rest(base).exp() @ rewards), abs=1e-5)
    assert path[-1][1] == pytest.approx(float(best.exp() @ rewards), abs=1e-5)
    for a in (0.13, 0.37, 0.71, 0.95):
        between, _ = runs.optimum(runs.with_rest(base), rewards, 0.5 / a)
        divergence = runs.kl(between, runs.with_rest(base))
        assert on_path(path, divergence) == pytest.approx(float(between.exp() @ rewards), abs=0.01)


def test_a_reward_models_optimum_is_scored_by_the_truth(monkeypatch):
    # A model that knows r* has pi* of beta 0.5; one with the opposite order has accuracy 0.
    prompt = training_prompts()[3]
    base = torch.tensor([0.99 * w for *_, w in answers(*prompt)], dtype=torch.float64).log()
    truth = runs.outcome_rewards(prompt)[:-1]
    monkeypatch.setattr(runs, "base_logps", lambda tuning: ([prompt], base[None],
                                                            torch.full((1, 288), 20)))
    monkeypatch.setattr(runs, "load_run", lambda path: FinishedRun(None, None, {}))
    monkeypatch.setattr(runs, "Tokenizer", lambda path: None)
    monkeypatch.setattr(runs, "world_trees", lambda *_: None)
    for sign, accuracy in ((1, 1.0), (-1, 0.0)):
        monkeypatch.setattr(runs, "tree_rewards", lambda *_, sign=sign: sign * truth)
        scores = runs.measure_reward_model(Run(Cell("hh", "reward_model"), 1e-3, 1))
        assert scores["reward accuracy"] == accuracy
        assert (scores["KL(pi||pi*)"] < 1e-9) == (sign == 1)


# ---- runs ---------------------------------------------------------------------------------------

def test_every_cell_is_a_command_that_parses(monkeypatch):
    monkeypatch.setattr(runs, "dataset_file", lambda folder, name, seed: "pairs.jsonl")
    run_json = {"method": "reward_model", "beta": 0.5, "dataset": "x", "held_out": 0, "lora_r": 8,
                "max_prompt_length": 512, "bf16": False, "model_name_or_path": "m"}
    monkeypatch.setattr(ppo, "read_run", lambda path: run_json)
    for cell in {cell for table in TABLES.values() for cell in table.cells}:
        assert cell.data in DATASETS
        run = Run(cell, 1.25e-4, 2)
        if cell.method.endswith("rlhf"):
            args = ppo.parse_args(arguments(run))
        else:
            args = train.parse_args(arguments(run), runs.ALL_METHODS)
        assert args.learning_rate == 1.25e-4 and args.seed == 2
        assert cell.after is None or args.sft_adapter.endswith(
            f"{cell.data}/sft/lr{cell.after.rate:g}-seed2/final")
        assert all(getattr(args, name) == value for name, value in (
            runs.RENAMED.get(flag, flag) for flag in cell.flags if flag[0] != "rate"))
        leader = cell.tuned_as or cell
        assert leader.tuned_as is None and (leader.rate or leader.rates)


def test_tuning_uses_training_prompts_and_a_test_uses_none_of_them(monkeypatch):
    used = []

    def world_logps(model, tokenizer, prompts):
        used.append(prompts)
        return torch.zeros(len(prompts), 288), torch.zeros(len(prompts), 288)

    monkeypatch.setattr(runs, "load_llama", lambda path: None)
    monkeypatch.setattr(runs, "Tokenizer", lambda path: None)
    monkeypatch.setattr(runs, "load_run", lambda path: FinishedRun(None, None, {}))
    monkeypatch.setattr(runs, "world_logps", world_logps)            # of base, then of policy
    monkeypatch.setattr(runs, "base_logps", runs.base_logps.__wrapped__)
    monkeypatch.setattr(runs, "kl_path", lambda *_: [])
    monkeypatch.setattr(runs, "prompt_scores", lambda *_: dict.fromkeys(runs.PER_PROMPT, 0.5))
    for seed in (*TUNING_SEEDS, 1, 5):
        runs.measure(Run(Cell("hh", "ulma"), 1e-3, seed))
    assert used[0::2] == used[1::2]
    used = used[::2]
    assert set(used[0]) <= set(training_prompts()) and len(used[0]) == 24
    assert sum(verb in BAD_VERBS for verb, _ in used[0]) == 12       # half are harmful requests
    assert used[0] == used[1] and used[2] == used[3]
    assert not set(used[2]) & set(training_prompts())


def test_every_claim_is_about_cells_of_the_tables():
    keys = {cell.key for table in TABLES.values() for cell in table.cells}
    assert not {key for claim in PRIMARY + PAPER_CLAIMS + QUESTIONS for key in claim.keys} - keys
    assert len(PRIMARY) <= 8


@pytest.fixture
def small_world(tmp_path, tiny_model, monkeypatch):
    """The tiny model in place of the base, two test prompts, 32 answers to learn from."""
    monkeypatch.setattr(runs, "base_model", lambda: tiny_model)
    monkeypatch.setattr(runs, "world_folder", lambda: str(tmp_path))
    monkeypatch.setattr(datasets, "RESPONSES", 32)
    monkeypatch.setattr(runs, "held_out_prompts", lambda: training_prompts()[40:41])
    runs.base_logps.cache_clear()
    threads = torch.get_num_threads()
    yield tmp_path
    runs.base_logps.cache_clear()
    torch.set_num_threads(threads)


def test_a_run_gives_the_same_numbers_twice_and_is_not_done_again(small_world, monkeypatch):
    run = Run(Cell("hh", "ulma"), 1e-2, 1)
    first = execute(run)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "arguments", None)                # a second training would raise
        assert execute(run) == first
    assert first["KL(pi||ref)"] > 0 and "step" in open(run.folder + ".log").read()


def test_a_run_that_was_killed_while_it_was_measured_is_measured(small_world, monkeypatch):
    run = Run(Cell("hh", "ulma"), 1e-2, 1)
    first = execute(run)
    (Path(run.folder) / "scores.json").unlink()
    monkeypatch.setattr(runs.train, "main", None)               # a second training would raise
    assert execute(run) == first


def test_a_tuning_run_that_broke_has_the_smallest_reward_and_a_test_run_that_broke_is_an_error(
        small_world, monkeypatch):
    def broken(*_, **__):
        raise FloatingPointError("loss nan")
    monkeypatch.setattr(runs.train, "main", broken)
    tuning, tested = (Run(Cell("hh", "ulma"), 1e-2, seed) for seed in (TUNING_SEEDS[1], 1))
    assert execute(tuning) == {"E[r]": -float("inf")}
    with pytest.raises(FloatingPointError):
        execute(tested)
    assert not Path(tuning.scores_file).exists()    # nor could it be read: JSON has no infinity


def test_a_run_that_was_killed_while_it_trained_goes_on_to_the_same_numbers(small_world):
    run = Run(Cell("hh", "ulma"), 1e-2, 1)
    first = execute(run)
    (Path(run.folder) / "scores.json").unlink()
    shutil.rmtree(f"{run.folder}/final")
    assert execute(run) == first


def test_a_run_that_another_process_trains_is_left_alone(small_world):
    # Bug this catches: of two studies at once, one removed the folder that the other wrote to.
    run = Run(Cell("hh", "ulma"), 1e-2, 1)
    Path(run.folder).mkdir(parents=True)
    log = Path(run.folder + ".log")
    log.write_text("step 1\n")
    with locked(f"{run.folder}/.lock", run.folder), pytest.raises(ValueError, match="in use by"):
        execute(run)
    assert log.read_text() == "step 1\n"


def test_runs_of_other_weights_have_another_folder_and_of_another_config_text_the_same(
        tmp_path, tiny_model, monkeypatch):
    model = tmp_path / "base"
    shutil.copytree(tiny_model, model)
    monkeypatch.setattr(runs, "base_model", lambda: str(model))
    names = []
    for change in (None, "config.json", "model.safetensors"):
        if change == "config.json":
            (model / change).write_text((model / change).read_text() + "\n")
        elif change:
            data = bytearray((model / change).read_bytes())
            data[-1] ^= 1
            (model / change).write_bytes(data)
        weights_of.cache_clear()
        names.append(runs.work_folder())
    weights_of.cache_clear()
    assert names[0] == names[1] != names[2]
