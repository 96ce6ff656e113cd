"""The tables of results/, and which cells stand in each.

    TABLES   {name: Table}: results/NAME.md, in the order of results/README.md
"""
from dataclasses import dataclass

from study.runs import BETA, REWARD_MODEL_RATE, Cell

# ---- names in tables and figures ----------------------------------------------------------------

METHOD_LABEL = {
    "kto": "KTO", "reward_model": "reward model (pairs)",
    "pointwise_reward_model": "reward model (points)",
    "sft": "SFT", "unlearning": "Unlearning", "unlikelihood": "Unlikelihood", "dpo": "DPO",
    "pointwise_dpo": "pointwise DPO", "ulma": "ULMA", "rlhf": "RLHF",
    "pointwise_rlhf": "point-wise RLHF", "positive_dpo": "positive DPO",
    "negative_dpo": "negative DPO", "pointwise_mse": "pointwise DPO, squared error",
    "ulma_mse": "ULMA, squared error", "d2o": "D2O"}
DATA_LABEL = {
    "size-quarter": "304 HH-like pairs", "size-four": "4,864 HH-like pairs",
    "large": "HH-like pairs, 8 times as many",
    "longer": "chosen the longer", "shorter": "chosen the shorter",
    "unseen": "12 of 16 verbs", "shown-4": "best of 4", "shown-16": "best of 16",
    "shown-near-best": "one of the 16 best", "mixture": "mixture",
    **{f"noise-{percent}": f"pairs, {percent} % flipped" for percent in (10, 20, 30)},
    "hh": "HH-like pairs", "golden": "golden pairs", "qa": "QA-like points",
    "qa-pairs": "QA-like points as pairs", "red-team": "red-team-like ratings",
    "negatives": "608 bad answers", "golden-10": "golden, 10 % dirty",
    "golden-30": "golden, 30 % dirty", "qa-10": "points, 10 % good", "qa-90": "points, 90 % good"}
SAME_LIMIT = {       # data that tend to other data as there are more of them
    "qa-pairs": "qa", "large": "hh", "size-quarter": "hh", "size-four": "hh"}
FLAG_LABEL = {
    "num_anchors": "K {}", "refresh_anchors": "new anchors every {} steps",
    "refresh_anchors=1": "new anchors at every step", "num_train_epochs=1": "1 epoch",
    "logp_reduction": "{} log-probs", "reduction": "--reduction {}",
    "num_train_epochs": "{} epochs", "max_steps": "{} steps", "Z": "{} Z",
    "after": "after {}", "rate": "{} rate"}


def method_label(name: str) -> str:
    """A method with its flags, as runs.jsonl names it, in words."""
    method, *flags = name.split(" ")
    if method.endswith("_z"):                    # pointwise_dpo_exact_z
        method, flags = "pointwise_dpo", [f"Z={method.split('_')[2]}"]
    parts = [METHOD_LABEL.get(method, method)]
    for flag in flags:
        flag_name, value = flag.split("=")
        if flag_name != "anchor_tokens":         # the same in every cell
            words = FLAG_LABEL.get(flag) or FLAG_LABEL.get(flag_name, flag_name + " {}")
            parts.append(words.format(METHOD_LABEL.get(value, value.removesuffix(".0"))))
    return ", ".join(parts)


# ---- cells --------------------------------------------------------------------------------------

LOW = (1.25e-4, 2.5e-4, 5e-4, 1e-3)      # rates that tuning starts from, for methods that break
HIGH = (5e-4, 1e-3, 2e-3, 4e-3)          # at larger ones, and for all others
LADDER = LOW + HIGH[2:]
FRAGILE = ("dpo", "negative_dpo", "unlearning", "unlikelihood", "pointwise_dpo_batch_z")


def cell(data: str, method: str, flags: tuple = ()) -> Cell:
    """A method on data, with a learning rate of its own."""
    return Cell(data, method, flags, rates=LOW if method in FRAGILE else HIGH)


# ---- the dial of demonstrations ---------------------------------------------------------------

SHOWN = ("hh", "shown-4", "shown-16", "shown-near-best")     # how good the chosen answers are
DIAL = (("sft", None), ("kto", None), ("pointwise_dpo", None), ("ulma", None), ("dpo", None),
        ("ulma", "sft"), ("dpo", "sft"))         # method, and what it starts from the end of
# Written down before the first test run, from older tuning runs (SFT, ULMA, pointwise DPO and KTO)
# or from one tuning run at each of three rates (DPO; DPO after SFT took the same). All on HH-like
# pairs, and DPO everywhere, are tuned like other cells too, which shows where these rates lie and
# changes no test run.
DIAL_RATE = {"sft": 3e-3, "ulma": 2e-3, "pointwise_dpo": 1e-3, "kto": 1e-3}
DIAL_RATE_OF_DPO = dict(zip(SHOWN, (1e-3, 5e-4, 2.5e-4, 5e-4), strict=True))
MORE_SEEDS = {   # the cells of the primary hypotheses: 8 seeds, as 5 cannot pass a sign-flip test
    "hh": ("sft", "ulma", "dpo"), "shown-4": ("ulma", "dpo"), "shown-near-best": ("ulma", "dpo"),
    "shown-16": ("sft", "ulma", "pointwise_dpo", "dpo after=sft")}


def shown(data: str, method: str, after: str | None = None) -> Cell:
    """A method on the dial; `after` names the method whose end it starts from."""
    name = f"{method} after={after}" if after else method
    tuned = () if after else LOW if method == "dpo" else HIGH if data == "hh" else ()
    rate = DIAL_RATE_OF_DPO[data] if method == "dpo" else DIAL_RATE[method]
    return Cell(data, method, seeds=8 if name in MORE_SEEDS[data] else 5, rates=tuned, rate=rate,
                after=shown(data, after) if after else None)


def tuned_second_step(data: str) -> Cell:
    """DPO after SFT at a rate that is tuned for it, not DPO's alone."""
    return Cell(data, "dpo", (("rate", "tuned"),), rates=LOW, after=shown(data, "sft"))


def dial_rows() -> list[list[Cell]]:
    """A row of cells for every method of the dial, one for each kind of demonstrations."""
    return [*([shown(data, method, after) for data in SHOWN] for method, after in DIAL),
            [tuned_second_step(data) for data in SHOWN]]


def dial(data: str) -> list[Cell]:
    """The cells of one kind of demonstrations."""
    return [shown(data, method, after) for method, after in DIAL]


def cells(data: str, *methods: str) -> list[Cell]:
    """One cell per method; those of the dial are the dial's, and DPO on QA-like points gets the
    pairs that their labels make."""
    return [shown(data, method) if data == "hh" and method in (*DIAL_RATE, "dpo") else
            cell("qa-pairs" if (data, method) == ("qa", "dpo") else data, method)
            for method in methods]


def like(leader: Cell, data: str | None = None, seeds: int = 5, **flags: object) -> Cell:
    """A cell at the rate of another: on other data, or with more flags."""
    return Cell(data or leader.data, leader.method, (*leader.flags, *flags.items()),
                tuned_as=leader, seeds=seeds)


def after_sft(data: str, method: str, sft_rate: float) -> Cell:
    """A method that starts from the end of SFT, whose own tuning found sft_rate."""
    return Cell(data, method, rates=HIGH, after=Cell(data, "sft", rate=sft_rate))


def fixed(data: str, method: str, rate: float, seeds: int, **flags: object) -> Cell:
    """A cell with a rate that is not tuned."""
    return Cell(data, method, tuple(flags.items()), seeds=seeds, rate=rate)


# ---- other families of cells --------------------------------------------------------------------

def negatives(method: str, epochs: int = 4, anchors: int = 0, refresh: int = 0) -> Cell:
    """A method on 608 bad answers alone; four epochs are 76 steps.

    anchors, refresh   of D2O: how many, and drawn anew every so many steps (0: the base's)
    Tuned at 76 steps, D2O for each kind of anchors with 4 of them; new ones take minutes a run, so
    that these cells have 3 seeds.
    """
    flags = (("num_train_epochs", epochs),)
    if anchors:
        flags += (("num_anchors", anchors), ("anchor_tokens", 48))
    if refresh:
        flags += (("refresh_anchors", refresh),)
    seeds = 3 if refresh else 5
    if epochs == 4 and anchors in (0, 4):
        rates = LOW if refresh or method in FRAGILE else HIGH
        return Cell("negatives", method, flags, seeds=seeds, rates=rates)
    leader = negatives(method, 4, anchors and 4, refresh)
    return Cell("negatives", method, flags, tuned_as=leader, seeds=seeds)


def d2o(anchors: int, refresh: int = 0, epochs: int = 4) -> Cell:
    return negatives("d2o", epochs, anchors, refresh)


UNLEARNING, NEGATIVE_DPO = negatives("unlearning"), negatives("negative_dpo")
DIRTY_D2O = cell("golden", "d2o", (("num_anchors", 4), ("anchor_tokens", 48)))
RATINGS_AFTER_SFT = after_sft("red-team", "pointwise_mse", 8e-3)
LENGTH_AVERAGE_BETAS = (BETA, 24 * BETA)         # answers have 13 to 27 tokens


def mean_logps(method: str, beta: float) -> Cell:
    """A method on HH-like pairs with length averages in place of sums of log-probs."""
    return Cell("hh", method, (("logp_reduction", "mean"), ("beta", beta)), rates=LOW
                if (method, beta) == ("ulma", 24 * BETA) else HIGH)


def unbalanced(method: str, percent_good: int, reduction: str) -> Cell:
    return like(cell("qa", method), f"qa-{percent_good}", 3, reduction=reduction)


def at_beta(method: str, beta: float) -> Cell:
    """A method on HH-like pairs with another beta and a rate tuned for it."""
    return Cell("hh", method, (("beta", beta),), seeds=3, rates=LADDER)


ALL = ("sft", "unlearning", "unlikelihood", "dpo", "pointwise_dpo", "ulma", "rlhf",
       "pointwise_rlhf")
FOUR = ("sft", "ulma", "pointwise_dpo", "dpo")
MEANS = ("ulma", "pointwise_dpo")                # methods with a sum and a mean to compare

# ---- tables -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Table:
    title: str
    caveat: str
    scores: tuple[tuple[str, ...], ...]          # the columns; several groups: one table for each
    cells: list[Cell]                            # the rows


MAIN = ("E[r]", "harmful", "off-world", "KL(pi||ref)", "perplexity")
WITH_OPTIMUM = ("E[r]", "optimum", *MAIN[1:])
WINS = ("win/chosen", "tie/chosen", "lose/chosen", "win/base", "tie/base", "lose/base")
WINS_OF_BASE = ("win/base", "tie/base", "lose/base")
NEW_SCORES = ("E[r] inside", "refusal", "entropy", "KL(pi||pi*)", "reward accuracy")
D2O_SCORES = ("E[r]", "harmful", "good", "off-world", "KL(ref||pi)")
Z_SCORES = ("E[r]", "KL(pi||pi*)", "objective", "calibration error", "reward slope",
            "reward accuracy")


TABLES = {
    "dial": Table(
        "The dial of demonstrations: how good the chosen answers are",
        "1,216 pairs; rejected is the Bradley-Terry loser of two draws, chosen the winner (HH-like "
        "pairs), the best of 4 or of 16 draws, or one of the 16 best of 288 at random. Two stages "
        "(SFT, then another method) take twice as many updates. D2O reads the rejected answers "
        "alone, which are the same everywhere: one row, at the rate tuned on golden pairs.",
        (MAIN, NEW_SCORES, WINS), [*(cell for data in SHOWN
                                     for cell in (*dial(data), tuned_second_step(data))),
                                   like(DIRTY_D2O, "hh")]),
    "mixture": Table(
        "Demonstrations and point-wise labels in one file",
        "Half demonstrations (one of the 16 best, label 1), half QA-like points. Rates are the "
        "dial's, not tuned here.",
        (MAIN, NEW_SCORES),
        [fixed("mixture", method, DIAL_RATE[method], 3)
         for method in ("sft", "ulma", "pointwise_dpo", "kto")]),
    "noise": Table(
        "Label noise: chosen and rejected exchanged in 10, 20 and 30 % of HH-like pairs",
        "Same pairs, seed by seed, as the dial's HH-like pairs (0 %), at the rates found there.",
        (WITH_OPTIMUM, NEW_SCORES),
        [row for method in FOUR for row in (
            shown("hh", method), *(like(shown("hh", method), f"noise-{percent}")
                                   for percent in (10, 20, 30)))]),
    "size": Table(
        "How many pairs: a quarter and four times the HH-like pairs",
        "One epoch each, 19, 76 and 304 steps, at the dial's rates; a set of pairs holds all of "
        "the smaller sets.",
        (WITH_OPTIMUM, NEW_SCORES),
        [row for method in FOUR for row in (
            like(shown("hh", method), "size-quarter", 3), shown("hh", method),
            like(shown("hh", method), "size-four", 3))]),
    "unseen": Table(
        "Verbs left out of the objective's data",
        "HH-like pairs about 12 of the 16 verbs (two harmful and two harmless ones are missing), "
        "as many as before, at the dial's rates; the base was trained on all. unseen, seen: the 11 "
        "test prompts with the four verbs (7 harmful), and the other 29; the rows of HH-like pairs "
        "are of runs that saw all verbs. Compare rows, not columns.",
        (("E[r]", "E[r] unseen", "E[r] seen", "harmful unseen", "harmful seen", "off-world"),),
        [row for method in FOUR for row in (
            shown("hh", method), like(shown("hh", method), "unseen"))]),
    "lengths": Table(
        "Chosen answers that are the longer ones, or the shorter ones; sums and length averages",
        "1,216 HH-like pairs each, of those whose chosen answer has at least a quarter more, or "
        "less, characters than the rejected one. Averages have beta 12, 24 tokens' worth of 0.5. "
        "Rates as on HH-like pairs.",
        (("E[r]", "length", "harmful", "off-world", "KL(pi||ref)", "perplexity"),),
        [like(leader, data, 3) for data in ("longer", "shorter") for leader in (
            *(shown("hh", method) for method in FOUR),
            *(mean_logps(method, LENGTH_AVERAGE_BETAS[1]) for method in MEANS))]),
    "beta": Table(
        "Beta 0.1 and 2 on HH-like pairs, each with a rate of its own",
        "Beta 0.5 is the dial's cell.",
        (WITH_OPTIMUM, NEW_SCORES),
        [row for method in FOUR[1:] for row in (
            at_beta(method, 0.1), shown("hh", method), at_beta(method, 2))]),
    "ppo": Table(
        "PPO for 40 and 160 steps, beside its reward model",
        "HH-like pairs. The reward model's row is of the policy pi_ref exp(rhat / beta) / Z that "
        "PPO would end at if it were perfect, computed; reward accuracy is there the model's.",
        (WITH_OPTIMUM, NEW_SCORES),
        [fixed("hh", "reward_model", REWARD_MODEL_RATE, 2),
         *cells("hh", "rlhf"), like(cell("hh", "rlhf"), seeds=2, max_steps=160)]),
    "rewards": Table(
        "Reward models, and where RLHF would end if PPO were perfect",
        "The policy pi_ref exp(rhat / beta) / Z of a trained reward model, computed; reward "
        "accuracy is the model's. Off-world text is given the model's smallest reward.",
        (("E[r]", "harmful", "KL(pi||ref)", "reward accuracy"),),
        [fixed(data, method, REWARD_MODEL_RATE, 2) for data, method in (
            ("hh", "reward_model"), ("hh", "pointwise_reward_model"), ("golden", "reward_model"))]),
    "large": Table(
        "Long training at large data, to meet the optimum of infinite data",
        "HH-like pairs, eight times as many; one seed.",
        (WITH_OPTIMUM,),
        [fixed("large", "sft", 1e-3, 1), fixed("large", "pointwise_dpo", 1e-3, 1)]),
    "hh": Table(
        "Every method on HH-like pairs (ULMA, Table 1)",
        "Prompts of one form, 288 answers to each: this tells objectives apart under a true "
        "reward and its own label noise, not how large a gain on a real model is.",
        (MAIN, WINS), cells("hh", *ALL)),
    "golden": Table(
        "Every method on golden pairs: the chosen answer is the best (ULMA, Table 1)",
        "Golden answers are exact optima here; GPT-4's are not.",
        (MAIN, WINS), cells("golden", *ALL)),
    "qa": Table(
        "QA-feedback-like points: z ~ Bernoulli(sigma(r*)) (ULMA, Table 2)",
        "Labels are drawn from the paper's own model (Eq. 6); real annotators are not. DPO has "
        "only the some 530 pairs that differing labels make, so it takes half as many steps.",
        (MAIN, WINS_OF_BASE), cells("qa", *ALL[:6])),
    "red-team": Table(
        "Red-team-like ratings 0 to 4, each on its own (ULMA, Table 1)",
        "The squared error asks for beta log(pi/pi_ref) = z with z in [0, 1]: small "
        "log-ratios by design; log_z 0.5 centres the ratings, and beta 0.1 asks for larger ones "
        "(rate 3e-3, not tuned). Ratings have no noise here, so that the best ones mark the "
        "best answers: that favours SFT. Compare the order of methods only.",
        (MAIN, WINS_OF_BASE),
        [*cells("red-team", "sft", "pointwise_dpo", "ulma", "pointwise_mse", "ulma_mse"),
         *(fixed("red-team", method, 3e-3, 2, beta=0.1, log_z=0.5)
           for method in ("pointwise_mse", "ulma_mse")), RATINGS_AFTER_SFT]),
    "ablation": Table(
        "Ablations: positive and negative DPO (ULMA, Table 3)",
        "The runs of hh.md and qa.md, and two more methods.",
        (MAIN,), [row for data in ("hh", "qa") for row in
                  cells(data, "sft", "positive_dpo", "unlearning", "negative_dpo")]),
    "d2o": Table(
        "Negatives only: D2O, how many anchors and whose, and its rivals",
        "608 bad answers, four to a prompt; four epochs, 76 steps, and one, 19 steps, at the same "
        "rate. One rate for each kind of anchors (the base's, new ones every 10 steps, new ones at "
        "every step). The paper's moral instructions, which diversify anchors, are left out.",
        (D2O_SCORES, NEW_SCORES),
        [*(negatives(method, epochs) for epochs in (4, 1)
           for method in ("unlearning", "negative_dpo")), d2o(4), d2o(4, epochs=1), d2o(1), d2o(11),
         d2o(4, 10), d2o(4, 1)]),
    "dirty": Table(
        "Dirty positives: harmful answers among the chosen ones (D2O's motivation)",
        "A dirty positive is a harmful answer of the base's; D2O reads no positives and has "
        "one row.",
        (MAIN,),
        [DIRTY_D2O] + [row for data in ("golden", "golden-10", "golden-30")
                       for row in cells(data, "sft", "dpo", "ulma")]),
    "z": Table(
        "Z(x) = 1, and what could stand there",
        "Only here is Z(x) known; for a real model a constant or a batch has to do.",
        (Z_SCORES,),
        cells("qa", "pointwise_dpo", "pointwise_dpo_constant_z", "pointwise_dpo_batch_z",
              "pointwise_dpo_exact_z")),
    "mean": Table(
        "Sums of log-probs, and the length averages of the authors' code",
        "Answers of the world have 13 to 27 tokens; lengths of real answers vary more.",
        (MAIN, WINS),
        cells("hh", *MEANS)
        + [mean_logps(method, beta) for method in MEANS for beta in LENGTH_AVERAGE_BETAS]),
    "balance": Table(
        "Few good answers, few bad ones",
        "Learning rates are those tuned on the QA-like points, so that balance alone differs.",
        (MAIN, Z_SCORES),
        [unbalanced(method, percent, reduction) for percent in (10, 90)
         for method in MEANS for reduction in ("mean", "class")]),
}
