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
    "size-quarter": "304 BT pairs", "size-four": "4,864 BT pairs",
    "large": "HH-like pairs, 8 times as many",
    "shown-bt": "BT pairs", "shown-4": "best of 4", "shown-16": "best of 16",
    "shown-near-best": "one of the 16 best", "mixture": "mixture",
    **{f"noise-{percent}": f"pairs, {percent} % flipped" for percent in (10, 20, 30)},
    "hh": "HH-like pairs", "golden": "golden pairs", "qa": "QA-like points",
    "qa-pairs": "QA-like points as pairs", "red-team": "red-team-like ratings",
    "negatives": "608 bad answers", "golden-10": "golden, 10 % dirty",
    "golden-30": "golden, 30 % dirty", "qa-10": "points, 10 % good", "qa-90": "points, 90 % good"}
SAME_LIMIT = {       # data that tend to other data as there are more of them
    "qa-pairs": "qa", "large": "hh", "size-quarter": "shown-bt", "size-four": "shown-bt"}
FLAG_LABEL = {
    "num_anchors": "K {}", "refresh_anchors": "new anchors every {} steps",
    "logp_reduction": "{} log-probs", "reduction": "--reduction {}",
    "num_train_epochs": "{} epochs", "max_steps": "{} steps", "Z": "{} Z",
    "after": "after {}", "learning_rate": "rate {}"}


def method_label(name: str) -> str:
    """A method with its flags, as runs.jsonl names it, in words."""
    method, *flags = name.split(" ")
    if method.endswith("_z"):                    # pointwise_dpo_exact_z
        method, flags = "pointwise_dpo", [f"Z={method.split('_')[2]}"]
    parts = [METHOD_LABEL.get(method, method)]
    for flag in flags:
        flag_name, value = flag.split("=")
        if flag_name != "anchor_tokens":         # the same in every cell
            words = FLAG_LABEL.get(flag_name, flag_name + " {}")
            parts.append(words.format(METHOD_LABEL.get(value, value)))
    return ", ".join(parts)


# ---- cells --------------------------------------------------------------------------------------

def cells(data: str, *methods: str) -> list[Cell]:
    """One cell per method; DPO on QA-like points gets the pairs that their labels make."""
    return [Cell("qa-pairs" if (data, method) == ("qa", "dpo") else data, method)
            for method in methods]


def d2o(anchors: int, refresh: int = 0) -> Cell:
    """D2O on bad answers alone; refresh: new anchors every so many steps, 0 = the base's.

    Its learning rate is tuned once, with 4 anchors of the base.
    """
    flags = (("num_anchors", anchors), ("anchor_tokens", 48))
    if refresh:
        flags += (("refresh_anchors", refresh),)
    return Cell("negatives", "d2o", flags, None if (anchors, refresh) == (4, 0) else d2o(4))


def mean_logps(method: str, beta: float) -> Cell:
    """A method on HH-like pairs with length averages in place of sums of log-probs."""
    return Cell("hh", method, (("logp_reduction", "mean"), ("beta", beta)))


def unbalanced(method: str, percent_good: int, reduction: str) -> Cell:
    return Cell(f"qa-{percent_good}", method, (("reduction", reduction),), Cell("qa", method))


def swept(cell: Cell) -> list[Cell]:
    """A cell again with other beta (where the method has one) and other numbers of epochs."""
    flags = [] if cell.method == "sft" else [("beta", beta) for beta in (0.1, 0.25, 1, 2)]
    flags += [("num_train_epochs", epochs) for epochs in (0.25, 0.5, 2)]
    return [Cell(cell.data, cell.method, (flag,), cell, seeds=3) for flag in flags]


ALL = ("sft", "unlearning", "unlikelihood", "dpo", "pointwise_dpo", "ulma", "rlhf",
       "pointwise_rlhf")
FRONTIER = cells("hh", "ulma", "pointwise_dpo", "dpo", "sft")
UNLEARNING, NEGATIVE_DPO = cells("negatives", "unlearning", "negative_dpo")
DIRTY_D2O = Cell("golden", "d2o", d2o(4).flags)
LENGTH_AVERAGE_BETAS = (BETA, 24 * BETA)         # answers have 13 to 27 tokens


# ---- the dial of demonstrations ---------------------------------------------------------------

SHOWN = ("bt", "4", "16", "near-best")           # how good the chosen answers are
# In the middle of one plateau of the older tuning runs on HH-like, QA-like and golden data. DPO
# has none, so that it is tuned for each kind of demonstrations; KTO's rate is pointwise DPO's.
RATES = {"sft": (3e-3,), "ulma": (2e-3,), "pointwise_dpo": (1e-3,), "dpo": (2.5e-4, 5e-4, 1e-3),
         "kto": (1e-3,)}
MORE_SEEDS = {   # the cells of the primary hypotheses: 8 seeds, as 5 cannot pass a sign-flip test
    "bt": ("sft", "ulma", "dpo"), "4": ("ulma", "dpo"), "near-best": ("ulma", "dpo"),
    "16": ("sft", "ulma", "pointwise_dpo", "dpo after=sft")}


def shown(how: str, method: str, after: str | None = None) -> Cell:
    """A method on the dial; `after` names the method whose end it starts from."""
    name = f"{method} after={after}" if after else method
    return Cell(f"shown-{how}", method, tuned_as=shown(how, method) if after else None,
                seeds=8 if name in MORE_SEEDS[how] else 5, rates=RATES[method],
                after=shown(how, after) if after else None)


def dial(how: str) -> list[Cell]:
    """The cells of one kind of demonstrations; KTO, and ULMA after SFT, for some only."""
    methods = [name for name in RATES if name != "kto" or how in ("bt", "16")]
    two_steps = ("dpo", "ulma") if how == "16" else ("dpo",)
    return [*(shown(how, method) for method in methods),
            *(shown(how, method, "sft") for method in two_steps)]


def fixed(data: str, method: str, rate: float, seeds: int, **flags: object) -> Cell:
    """A cell with a rate that is not tuned."""
    return Cell(data, method, tuple(flags.items()), seeds=seeds, rates=(rate,))


def like_bt(data: str, method: str, seeds: int) -> Cell:
    """A method at the rate that it has on the dial's BT pairs."""
    return Cell(data, method, tuned_as=shown("bt", method), seeds=seeds, rates=RATES[method])


FACTORS_OF_TWO = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)


def at_beta(method: str, beta: float) -> Cell:
    """A method on the dial's BT pairs with another beta and a rate tuned for it."""
    return Cell("shown-bt", method, (("beta", beta),), seeds=3, rates=FACTORS_OF_TWO)


FOUR = ("sft", "ulma", "pointwise_dpo", "dpo")

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


def dial_rate(method: str) -> float:
    """The middle one of a method's rates on the dial."""
    return RATES[method][len(RATES[method]) // 2]


TABLES = {
    "dial": Table(
        "The dial of demonstrations: how good the chosen answers are",
        "1,216 pairs; rejected is the Bradley-Terry loser of two draws, chosen the winner (BT "
        "pairs), the best of 4 or of 16 draws, or one of the 16 best of 288 at random. Two steps "
        "(SFT, then another method) take twice as many updates.",
        (MAIN, NEW_SCORES, WINS), [cell for how in SHOWN for cell in dial(how)]),
    "mixture": Table(
        "Demonstrations and point-wise labels in one file",
        "Half demonstrations (one of the 16 best, label 1), half QA-like points. Rates are the "
        "dial's, not tuned here.",
        (MAIN, NEW_SCORES),
        [fixed("mixture", method, dial_rate(method), 3)
         for method in ("sft", "ulma", "pointwise_dpo", "kto")]),
    "noise": Table(
        "Label noise: chosen and rejected exchanged in 10, 20 and 30 % of BT pairs",
        "Same pairs, seed by seed, as the dial's BT pairs (0 %), at the rates found there.",
        (WITH_OPTIMUM, NEW_SCORES),
        [cell for method in FOUR for cell in (
            shown("bt", method), *(like_bt(f"noise-{percent}", method, 5)
                                   for percent in (10, 20, 30)))]),
    "size": Table(
        "How many pairs: a quarter and four times the dial's BT pairs",
        "One epoch each, 19, 76 and 304 steps, at the dial's rates; a set of pairs holds all of "
        "the smaller sets.",
        (WITH_OPTIMUM, NEW_SCORES),
        [cell for method in FOUR for cell in (
            like_bt("size-quarter", method, 3), shown("bt", method),
            like_bt("size-four", method, 3))]),
    "beta": Table(
        "Beta 0.1 and 2 on BT pairs, each with a rate of its own",
        "Rates tuned over 1.25e-4 to 4e-3 in factors of 2; beta 0.5 is the dial's cell.",
        (WITH_OPTIMUM, NEW_SCORES),
        [cell for method in FOUR[1:] for cell in (
            at_beta(method, 0.1), shown("bt", method), at_beta(method, 2))]),
    "ppo": Table(
        "PPO for 40 and 160 steps, beside its reward model",
        "BT pairs. The reward model's row is of the policy pi_ref exp(rhat / beta) / Z that PPO "
        "would end at if it were perfect, computed; reward accuracy is there the model's. PPO's "
        "rate is the one tuned at 40 steps on HH-like pairs of the older base.",
        (WITH_OPTIMUM, NEW_SCORES),
        [fixed("shown-bt", "reward_model", REWARD_MODEL_RATE, 2),
         *(fixed("shown-bt", "rlhf", 1e-3, 2, max_steps=steps) for steps in (40, 160))]),
    "negatives": Table(
        "Negatives only for 76 steps, each method with a rate of its own",
        "608 bad answers, four epochs; rates tuned over 1.25e-4 to 4e-3 in factors of 2.",
        (D2O_SCORES, NEW_SCORES),
        [Cell("negatives", cell.method, (("num_train_epochs", 4), *cell.flags), seeds=2,
              rates=FACTORS_OF_TWO)
         for cell in (UNLEARNING, NEGATIVE_DPO, d2o(4))]),
    "artefacts": Table(
        "Settings that decided a verdict, changed",
        "Ratings z - 1/2 (z with log_z 1/2) at beta 0.1 in place of z at 0.5; anchors of the "
        "current policy at 1e-3 in place of 3e-3; DPO with small beta at 3e-4 in place of 1e-3.",
        (MAIN, NEW_SCORES),
        [*(fixed("red-team", method, 3e-3, 2, beta=0.1, log_z=0.5)
           for method in ("pointwise_mse", "ulma_mse")),
         *(fixed("negatives", "d2o", 1e-3, 2, **dict(d2o(anchors, 1).flags), learning_rate=1e-3)
           for anchors in (1, 11)),
         *(fixed("hh", "dpo", 3e-4, 2, beta=beta, learning_rate=3e-4) for beta in (0.1, 0.25))]),
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
        "log-ratios by design. Ratings have no noise here, so that the best ones mark the "
        "best answers: that favours SFT. Compare the order of methods only.",
        (MAIN, WINS_OF_BASE),
        cells("red-team", "sft", "pointwise_dpo", "ulma", "pointwise_mse", "ulma_mse")),
    "ablation": Table(
        "Ablations: positive and negative DPO (ULMA, Table 3)",
        "The same runs as above, and two more methods.",
        (MAIN,), [cell for data in ("hh", "qa") for cell in
                  cells(data, "sft", "positive_dpo", "unlearning", "negative_dpo")]),
    "d2o": Table(
        "D2O: how many anchors, and whose",
        "Negatives only: 608 bad answers, four to a prompt. One tuned learning rate for all "
        "D2O rows. The paper's moral instructions, which diversify anchors, are left out.",
        (D2O_SCORES,),
        [UNLEARNING, NEGATIVE_DPO, d2o(4), d2o(1), d2o(2), d2o(11)]
        + [d2o(anchors, refresh) for refresh in (10, 1) for anchors in (1, 2, 4, 11)]),
    "dirty": Table(
        "Dirty positives: harmful answers among the chosen ones (D2O's motivation)",
        "A dirty positive is a harmful answer of the base's; D2O reads no positives and has "
        "one row.",
        (MAIN,),
        [DIRTY_D2O] + [cell for data in ("golden", "golden-10", "golden-30")
                       for cell in cells(data, "sft", "dpo", "ulma")]),
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
        cells("hh", "ulma", "pointwise_dpo")
        + [mean_logps(method, beta) for method in ("ulma", "pointwise_dpo")
           for beta in LENGTH_AVERAGE_BETAS]),
    "balance": Table(
        "Few good answers, few bad ones",
        "Learning rates are those tuned on the QA-like points, so that balance alone differs.",
        (MAIN, Z_SCORES),
        [unbalanced(method, percent, reduction) for percent in (10, 90)
         for method in ("pointwise_dpo", "ulma") for reduction in ("mean", "class")]),
    "frontier": Table(
        "Reward and KL: beta and the number of steps swept",
        "Rows of one method differ in beta or in the number of steps, as named; rates are "
        "those tuned at beta 0.5 and one epoch; 3 seeds where swept.",
        (MAIN,), FRONTIER + [variant for cell in FRONTIER for variant in swept(cell)]),
}
