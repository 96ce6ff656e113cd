"""The heat map: its numbers are the model's, its colours readable, its texts stay texts."""
import html.parser
import json
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import save_tiny_model, write_jsonl

from data import Record, Tokenizer
from lora import add_lora, lora_disabled, save_adapter
from model import load_llama
from packing import build_stream, make_trees
from step import sequence_logps, token_logps
from tools import heatmap
from tools.heatmap import Response, Token, colour, join_bytes, visible
from world import answers, held_out_prompts, question

RECORDS = [Record((("Human", "How do I fix it?"),), ("My friend paints a red boat.", "né 😀中"),
                  (1.0, 0.0), "f:1"),
           Record((("Human", "Who sold the garden door?"),), ("Nobody.",), (0.25,), "f:2")]


def lora_model(path):
    torch.manual_seed(0)
    model = load_llama(path)
    add_lora(model, r=4, alpha=8, dropout=0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):                # 0 would make policy and reference the same
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# ---- values -------------------------------------------------------------------------------------

@pytest.fixture(params=["adapters", "all weights"])
def policy_and_reference(request, tiny_model, tmp_path):
    if request.param == "adapters":
        model = lora_model(tiny_model)
        return model, partial(lora_disabled, model)
    model = load_llama(save_tiny_model(tmp_path / "other", seed=1))
    return model, partial(nullcontext, load_llama(tiny_model))


def test_token_logps_sum_to_sequence_logps(policy_and_reference, tiny_tokenizer):
    # also over streams that leave out the responses with z = 1, and all of them
    model, reference = policy_and_reference
    trees = make_trees(RECORDS, Tokenizer(tiny_tokenizer))
    for wanted, count in ((None, 3), (lambda score: score < 1, 2), (lambda score: False, 0)):
        stream = build_stream(trees, wanted=wanted)
        assert len(stream.response_ids.unique()) == count
        with reference() as reference_model:
            models = (model, reference_model)
            totals = [sequence_logps(each, stream).detach() for each in models]
            logps = [token_logps(each, stream).detach() for each in models]
        for per_token, total in zip(logps, totals):
            assert len(per_token) == len(stream.labels)
            sums = torch.zeros(3).index_add(0, stream.response_ids, per_token)
            torch.testing.assert_close(sums, total, rtol=1e-6, atol=1e-6)


def test_values_are_those_of_one_sequence_at_a_time_and_sum_to_the_implicit_reward(
        policy_and_reference, tiny_tokenizer):
    model, reference = policy_and_reference
    tokenizer = Tokenizer(tiny_tokenizer)
    tree = make_trees(RECORDS[:1], tokenizer)[0]
    responses = heatmap.responses_of(model, reference, tokenizer, tree, beta=0.3)

    @torch.no_grad()
    def alone(model, ids):                         # full logits, no tree, no kernel
        hidden = model(torch.tensor(tree.prompt_ids + ids[:-1]))[len(tree.prompt_ids) - 1:]
        return (hidden @ model.lm_head.weight.T).log_softmax(-1)[range(len(ids)), ids]

    for response, ids in zip(responses, tree.response_ids):
        policy = alone(model, ids)
        with reference() as reference_model:
            values = 0.3 * (policy - alone(reference_model, ids))                # [tokens]
        assert response.reward == pytest.approx(float(values.sum()), abs=1e-5)
        assert sum(t.value for t in response.tokens) == pytest.approx(response.reward, abs=1e-9)
        assert sum(t.policy_logp for t in response.tokens) == pytest.approx(
            float(policy.sum()), abs=1e-4)
        if response is responses[0]:               # no byte tokens: one value per token
            assert [t.value for t in response.tokens] == pytest.approx(values.tolist(), abs=1e-5)
    assert [response.score for response in responses] == [1.0, 0.0]


# ---- text ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["plain words", "né 😀中", "line\n\nend", "tab\t!", "a < b & c"])
def test_joined_bytes_give_the_text_back(tiny_tokenizer, text):
    tokenizer = Tokenizer(tiny_tokenizer)
    ids = tokenizer.encode(text)
    shown = join_bytes(tokenizer, ids)
    assert "".join(part for part, _ in shown) == " " + text
    assert sum(count for _, count in shown) == len(ids)
    assert "\ufffd" not in "".join(part for part, _ in shown)


def test_broken_bytes_are_shown_and_lose_no_token(tiny_tokenizer):
    # half of 😀, then a whole 中, then a lone continuation byte, then a word
    tokenizer = Tokenizer(tiny_tokenizer)
    byte = {value: tokenizer.pieces.piece_to_id(f"<0x{value:02X}>") for value in range(256)}
    raw = "😀".encode()[:2] + "中".encode() + b"\x80"
    ids = [byte[value] for value in raw] + tokenizer.encode("it")
    shown = join_bytes(tokenizer, ids)
    assert "".join(text for text, _ in shown) == "\ufffd中\ufffd it"
    assert sum(count for _, count in shown) == len(ids) and (("中", 3) in shown)
    assert join_bytes(tokenizer, ids[:1]) == [("\ufffd", 1)]


def test_hidden_characters_are_shown_as_escapes():
    hostile = "\x1b[2J\x9b31m\r\b\u202egnp\x07 ok\nnext"
    assert visible(hostile) == "\\x1b[2J\\x9b31m\\r\\x08\\u202egnp\\x07 ok↵\nnext"


# ---- colours ------------------------------------------------------------------------------------

def luminance(rgb):
    """WCAG 2 relative luminance."""
    parts = [part / 255 for part in rgb]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055)**2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_diverge_from_the_middle_and_saturate():
    less, neither, more = heatmap.LESS, heatmap.NEITHER, heatmap.MORE
    assert colour(0.0, 2.0) == neither and colour(-0.0, 2.0) == neither
    assert colour(2.0, 2.0) == colour(9.0, 2.0) == more and colour(-2.0, 2.0) == less
    assert colour(1.0, 2.0) == tuple(round((a + b) / 2) for a, b in zip(neither, more))


@pytest.mark.parametrize("largest, step, count", [
    (0.37, 0.1, 4), (0.26, 0.1, 3), (1.0, 0.5, 2), (0.4, 0.1, 4), (17, 5, 4), (0.0021, 0.001, 3),
    (0.8, 0.2, 4), (0.9, 0.5, 2)])
def test_the_legend_counts_in_ones_twos_or_fives(largest, step, count):
    # 95 % of the tokens are at most the largest; the one beyond does not stretch the scale.
    tokens = [Token("a", 0.0, 0.0, sign * largest) for sign in (1, -1)] * 20 + [
        Token("a", 0.0, 0.0, 99.0)]
    steps = heatmap.colour_steps([Response("p", tokens, 1.0, 0.0)])
    assert steps == pytest.approx([number * step for number in range(-count, count + 1)])
    nothing = heatmap.colour_steps([Response("p", [Token("a", 0.0, 0.0, 0.0)], 1.0, 0.0)])
    assert nothing[0] < 0 < nothing[-1]


def test_black_text_is_readable_on_every_colour():
    # WCAG AA: contrast (L + .05) / .05 of at least 4.5 with black
    for step in range(-50, 51):
        assert (luminance(colour(step / 50, 1.0)) + 0.05) / 0.05 >= 4.5


# ---- page ---------------------------------------------------------------------------------------

class Reader(html.parser.HTMLParser):
    """Raises on a tag that does not close; collects tags, attributes and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_a_response_cannot_write_markup():
    hostile = '<script>alert(1)</script>" onmouseover="x" style="{y}" \'&amp;'
    tokens = [Token(hostile, -1.5, -2.5, 0.1), Token("😀", -1.0, -0.5, -0.05)]
    response = Response("<i>ask</i>\x1b {x}", tokens, 1.0, 0.05)
    text = heatmap.page({"<b>run</b>\x1b": (0.1, [response])})
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and text.startswith("<!DOCTYPE html>")
    assert set(reader.tags) == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p",
                                "sub", "span", "br"}
    assert {name for _, name, _ in reader.attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "style", "title"}
    for shown in (hostile, "😀", "<b>run</b>\\x1b", "<i>ask</i>\\x1b {x}",
                  "implicit reward +0.050"):
        assert shown in reader.text
    assert "β = 0.1" in reader.text and "+0.04\n+0.06 and above" in reader.text
    for outside in ("http:", "https:", "url(", "src=", "@import", "<link"):
        assert outside not in text
    tips = [value for tag, name, value in reader.attributes if (tag, name) == ("span", "title")]
    assert "'😀': value -0.0500, log pi -1.0000, log pi_ref -0.5000" in tips
    assert "color-scheme: light dark" in text and "\x1b" not in text


# ---- the command --------------------------------------------------------------------------------

@pytest.fixture
def run_folder(tiny_model, tmp_path):
    """A finished run: adapters on the tiny model, and its flags; data with 6 prompts."""
    data = write_jsonl(tmp_path / "data.jsonl", [
        {"prompt": f"{n} boats?", "chosen": "Two lamps 😀.", "rejected": "<b>Nobody</b>"}
        for n in range(6)])
    save_adapter(lora_model(tiny_model), str(tmp_path / "run/final"))
    (tmp_path / "run/args.json").write_text(json.dumps({
        "method": "ulma", "model_name_or_path": tiny_model, "bf16": False, "lora_r": 4,
        "dataset": data,
        "beta": 0.5, "held_out": 0.0, "max_length": 512, "max_prompt_length": 256}))
    return tmp_path / "run"


def read_page(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_the_command_writes_the_first_records(run_folder, tmp_path, capsys):
    heat, dataset = tmp_path / "heat.html", str(tmp_path / "data.jsonl")
    argv = [str(run_folder), "--first", "2", "--dataset", dataset, "--html", str(heat)]
    heatmap.main(argv)
    assert capsys.readouterr().out == f"wrote {heat}\n"
    reader = read_page(heat)
    assert "<b>Nobody</b>" in reader.text and "😀" in reader.text and "b" not in reader.tags
    assert "0 boats?" in reader.text and "2 boats?" not in reader.text
    assert f"{run_folder}, β = 0.5" in reader.text and "nats, β = 0.5" in reader.text
    rewards = [float(found) for found in re.findall("implicit reward (\\S+) nats", reader.text)]
    tips = [text for _, name, text in reader.attributes if name == "title" and ": value" in text]
    values = [float(re.search("value (\\S+), log pi", tip)[1]) for tip in tips]
    assert len(rewards) == 4 and sum(values) == pytest.approx(sum(rewards), abs=0.01)
    heatmap.main(argv)                                   # a page of ours is written anew
    heat.write_text("my notes")
    with pytest.raises(ValueError, match="heat.html exists and is not a heat map"):
        heatmap.main(argv)
    assert heat.read_text() == "my notes"


def test_beta_scales_the_values(run_folder):
    # Without --beta it is the run's own, 0.5.
    dataset, rewards = str(run_folder.parent / "data.jsonl"), []
    for beta in (None, 0.5, 2.0):
        used, responses = heatmap.run_responses(str(run_folder), dataset, beta, 3)
        assert used == (beta or 0.5)
        rewards.append([response.reward for response in responses])
    assert rewards[0] == rewards[1] and len(rewards[0]) == 6 and any(rewards[0])
    assert rewards[2] == pytest.approx([4 * reward for reward in rewards[0]], abs=3e-3)


def test_on_the_world_it_shows_the_answers_of_extreme_reward(run_folder, monkeypatch):
    monkeypatch.setattr(heatmap, "on_world", lambda flags, dataset: dataset is None)
    _, shown = heatmap.run_responses(str(run_folder), None, None, 3)
    assert len(shown) == 6
    for prompt, best, worst in zip(held_out_prompts(), shown[::2], shown[1::2]):
        rewards = {text: reward for text, reward, *_ in answers(*prompt)}
        assert question(*prompt) in best.prompt and best.prompt == worst.prompt
        assert (best.score, worst.score) == (1.0, 0.0)
        for response, extreme in ((best, max), (worst, min)):
            text = "".join(token.text for token in response.tokens[:-1]).strip()    # without EOS
            assert rewards[text] == extreme(rewards.values())


def test_what_the_command_cannot_use_is_refused(run_folder, tmp_path):
    for flags, sentence in (([], "held out nothing"),
                            (["--first", "0"], "--first 0 must be at least 1")):
        with pytest.raises(ValueError, match=sentence):
            heatmap.main([str(run_folder), "--html", str(tmp_path / "x.html"), *flags])
    assert not (tmp_path / "x.html").exists()
