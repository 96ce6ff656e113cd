"""What is tried: six primary hypotheses, every claim of the two papers, and questions of our own.

    PRIMARY       written down before their runs; Holm's correction
    PAPER_CLAIMS  ULMA's abstract, 5.2 and 5.3, D2O's abstract; exploratory (Benjamini-Hochberg)
    UNTESTED      claims of the papers that no row of runs.jsonl tries, and why
    QUESTIONS     what no paper claims, stated one way round; exploratory too
"""
from study.statistics import Claim
from study.tables import (
    DIRTY_D2O,
    LENGTH_AVERAGE_BETAS,
    DATA_LABEL,
    FOUR,
    MEANS,
    METHOD_LABEL,
    NEGATIVE_DPO,
    RATINGS_AFTER_SFT,
    SHOWN,
    UNLEARNING,
    Cell,
    cells,
    d2o,
    like,
    mean_logps,
    negatives,
    shown,
    tuned_second_step,
    unbalanced,
)


def versus(source: str, words: str, better: Cell, worse: Cell | None, score: str = "E[r]",
           how: str = "more") -> Claim:
    return Claim(source, words, better.key, worse and worse.key, score, how)


def same_data(source: str, words: str, data: str, better: str, worse: str,
              how: str = "more") -> Claim:
    """A claim about two methods on the same data."""
    return versus(source, words, *cells(data, better, worse), how=how)


# ---- primary ------------------------------------------------------------------------------------

PRIMARY = [
    versus("primary 1", "HH-like pairs: ULMA beats SFT", shown("hh", "ulma"), shown("hh", "sft")),
    versus("primary 2", "HH-like pairs: ULMA beats DPO at equal KL", shown("hh", "ulma"),
           shown("hh", "dpo"), how="at equal KL"),
    versus("primary 3", "best of 4: ULMA beats DPO", shown("shown-4", "ulma"),
           shown("shown-4", "dpo")),
    versus("primary 4", "best of 16: ULMA beats pointwise DPO", shown("shown-16", "ulma"),
           shown("shown-16", "pointwise_dpo")),
    versus("primary 5", "best of 16: ULMA in one step is at most 0.1 nats below SFT, then DPO",
           shown("shown-16", "ulma"), shown("shown-16", "dpo", "sft"), how="not below"),
    versus("primary 6", "one of the 16 best: ULMA beats DPO", shown("shown-near-best", "ulma"),
           shown("shown-near-best", "dpo")),
]

# ---- the papers ---------------------------------------------------------------------------------

RIVALS = ("sft", "unlearning", "unlikelihood", "dpo", "pointwise_dpo", "rlhf")


def golden_gain(words: str, method: str, other: str) -> Claim:
    """That a method gains more than another from golden pairs in place of HH-like ones."""
    return Claim("ULMA 5.2", words, ("golden", method), ("golden", other),
                 before=(("hh", method), ("hh", other)))


ULMA_CLAIMS = [
    *(same_data("ULMA 5.2 (ii)", f"{data_name}: ULMA beats {METHOD_LABEL[other]}", data, "ulma",
                other)
      for data, data_name, others in (("hh", "HH-like", RIVALS), ("golden", "golden", RIVALS),
                                      ("qa", "QA-like", RIVALS[:5])) for other in others),
    *(same_data("ULMA 5.2 (ii)", f"ratings z: ULMA beats {words}", "red-team", "ulma_mse", other)
      for words, other in (("SFT", "sft"), ("pointwise DPO", "pointwise_mse"))),
    *(same_data("ULMA 5.2 (i)", f"{name}: pointwise DPO is comparable to DPO", data,
                "pointwise_dpo", "dpo", "comparable")
      for name, data in (("HH-like", "hh"), ("golden", "golden"))),
    *(same_data("ULMA 5.2 (i)", f"{name}: or slightly worse", data, "dpo", "pointwise_dpo")
      for name, data in (("HH-like", "hh"), ("golden", "golden"))),
    same_data("ULMA 5.2 (i)", "QA-like: pointwise DPO beats DPO", "qa", "pointwise_dpo", "dpo"),
    same_data("ULMA 5.2 (i)", "ratings z: pointwise DPO improves on SFT", "red-team",
              "pointwise_mse", "sft"),
    versus("ULMA 5.2 (i)", "ratings z: pointwise DPO improves an SFT model that it starts from",
           RATINGS_AFTER_SFT, RATINGS_AFTER_SFT.after),
    *(versus("ULMA 5.2", f"{METHOD_LABEL[method]} does better on golden than on HH-like pairs",
             Cell("golden", method), Cell("hh", method))
      for method in ("ulma", *RIVALS)),
    *(golden_gain(f"ULMA gains more from golden pairs than {METHOD_LABEL[other]}", "ulma", other)
      for other in RIVALS),
    *(same_data("ULMA 5.3", f"{name}: {words}", data, better, worse)
      for name, data in (("HH-like", "hh"), ("QA-like", "qa")) for words, better, worse in (
          ("SFT beats positive DPO", "sft", "positive_dpo"),
          ("negative DPO beats unlearning", "negative_dpo", "unlearning"))),
    *(same_data("ULMA abstract", f"demonstrations and points mixed: ULMA beats "
                f"{METHOD_LABEL[other]}", "mixture", "ulma", other)
      for other in ("sft", "pointwise_dpo", "kto")),
]
D2O_CLAIMS = [
    versus("D2O abstract", "reduces harm, from bad answers alone", d2o(4), None, "harmful"),
    versus("D2O abstract", "less harm than unlearning", d2o(4), UNLEARNING, "harmful"),
    versus("D2O abstract", "less harm than negative DPO", d2o(4), NEGATIVE_DPO, "harmful"),
    versus("D2O abstract", "preserves helpfulness: E[r] on harmless prompts not below the base's",
           d2o(4), None, "E[r] harmless", how="not below"),
    versus("D2O abstract", "and above negative DPO's", d2o(4), NEGATIVE_DPO, "E[r] harmless"),
    versus("D2O abstract", "comparable quality: E[r] not below the base's", d2o(4), None,
           how="not below"),
    *(versus("D2O abstract", f"avoids collapse: less off-world mass than {name}", d2o(4), other,
             "off-world") for name, other in (("unlearning", UNLEARNING),
                                              ("negative DPO", NEGATIVE_DPO))),
    versus("D2O abstract", "more stable: E[r] varies less over seeds than negative DPO's", d2o(4),
           NEGATIVE_DPO, "instability"),
    *(versus("D2O abstract", f"faster convergence: less harm than {name} in runs of 19 steps, at "
             "the rates of 76",
             d2o(4, epochs=1), negatives(method, 1), "harmful")
      for name, method in (("unlearning", "unlearning"), ("negative DPO", "negative_dpo"))),
    versus("D2O abstract", "beats unlearning", d2o(4), UNLEARNING),
    versus("D2O abstract", "beats negative DPO", d2o(4), NEGATIVE_DPO),
    *(versus("D2O abstract", f"noisy positives: with {percent} % harmful ones, less harm than "
             f"{METHOD_LABEL[other.method]}", DIRTY_D2O, other, "harmful")
      for percent in (10, 30) for other in cells(f"golden-{percent}", "dpo", "ulma", "sft")),
]
PAPER_CLAIMS = ULMA_CLAIMS + D2O_CLAIMS
UNTESTED = [      # (source, words, because)
    ("ULMA abstract", "efficiency", "no row of results/: bench/README.md measures it; a step of "
     "ULMA needs no reference for good answers"),
    ("ULMA abstract", "a new data set of good demonstrations on harmlessness",
     "a data set is no claim about an objective; golden pairs stand for it"),
    ("ULMA 5.2 (i)", "pair-wise DPO is inapplicable to ratings of single answers",
     "true by construction: one response to a prompt makes no pair"),
    ("D2O abstract", "more informative responses", "answers of the world have no information "
     "beyond r*"),
    ("D2O abstract", "an upper bound of the instance-level DPO", "a theorem about the formula, "
     "not a measurement: -log sigma is convex; tests/test_d2o_loss.py tries it on numbers"),
]

# ---- our own ------------------------------------------------------------------------------------

QUESTIONS = [
    *(versus("dial", f"{name}: {words}", shown(data, better), shown(data, *worse), how=test)
      for data, name in (("hh", "HH-like pairs"), ("shown-4", "best of 4"),
                         ("shown-16", "best of 16"),
                         ("shown-near-best", "one of the 16 best"))
      for words, better, worse, test in (
          ("ULMA beats SFT", "ulma", ("sft",), "more"),
          ("ULMA beats pointwise DPO", "ulma", ("pointwise_dpo",), "more"),
          ("ULMA beats DPO", "ulma", ("dpo",), "more"),
          ("ULMA beats DPO at equal KL", "ulma", ("dpo",), "at equal KL"),
          ("ULMA beats SFT, then DPO", "ulma", ("dpo", "sft"), "more"),
          ("ULMA beats KTO", "ulma", ("kto",), "more"))),
    *(versus("dial", f"{DATA_LABEL[data]}: ULMA beats SFT, then DPO at a rate tuned for it",
             shown(data, "ulma"), tuned_second_step(data)) for data in SHOWN),
    *(same_data("RLHF", f"{name}: ULMA beats point-wise RLHF", data, "ulma", "pointwise_rlhf")
      for name, data in (("HH-like", "hh"), ("golden", "golden"))),
    versus("anchors", "11 anchors beat 1", d2o(11), d2o(1)),
    versus("anchors", "a lagged policy's beat the base's (K = 4)", d2o(4, 10), d2o(4)),
    versus("anchors", "the current policy's are worse than the base's (K = 4)", d2o(4), d2o(4, 1)),
    *(versus("verbs", f"{METHOD_LABEL[method]}: data that leave out a prompt's verb cost reward "
             "there", shown("hh", method), like(shown("hh", method), "unseen"), "E[r] unseen")
      for method in FOUR),
    *(versus("lengths", f"{METHOD_LABEL[method]}, {DATA_LABEL[data]}: sums beat length averages",
             like(shown("hh", method), data),
             like(mean_logps(method, LENGTH_AVERAGE_BETAS[1]), data))
      for data in ("longer", "shorter") for method in MEANS),
    *(versus("Z", f"{words} comes closer to pi* than Z = 1",
             *cells("qa", f"pointwise_dpo_{name}_z", "pointwise_dpo"), "KL(pi||pi*)")
      for words, name in (("the exact Z(x)", "exact"), ("a constant Z", "constant"),
                          ("a batch's estimate", "batch"))),
    *(versus("sums", f"{METHOD_LABEL[method]}: sums beat length averages, beta {beta:g}",
             shown("hh", method), mean_logps(method, beta))
      for method in MEANS for beta in LENGTH_AVERAGE_BETAS),
    *(versus("balance",
             f"{METHOD_LABEL[method]}, {percent} % good: one mean beats a mean per class",
             unbalanced(method, percent, "mean"), unbalanced(method, percent, "class"))
      for percent in (10, 90) for method in MEANS),
]
QUESTIONS = [claim for claim in QUESTIONS if all(       # without what stands above already
    (claim.keys, claim.how, claim.score) != (other.keys, other.how, other.score)
    for other in PRIMARY + PAPER_CLAIMS)]
