"""A Llama in one GGUF file to a Hugging Face folder: weights, config.json, tokenizer, template.

    python -m tools.gguf SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2

Weights are taken out of their quantisation by the package gguf and written in --dtype, tensor by
tensor. The tokenizer becomes tokenizer.model (SentencePiece) or tokenizer.json (byte-level BPE).
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import Help, Parser, parse_first, run_cli


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=Help)
    parser.add_argument("file", metavar="FILE", help="a Llama in GGUF")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not be there")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights written")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before torch, which takes seconds to import

import math
import os
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from files.config import Llama3Rope, LlamaConfig, write_config
from files.lock import locked
from files.text import write_folder, write_json, write_text
from files.weights import write_weights
from model import Llama, rotary_angles

# Tensor names: of a layer in GGUF, and here.
LAYER_NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
               "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
               "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
               "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# What byte-level BPE cuts a text into, by the name that llama.cpp has for it.
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
           r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {
    "gpt-2": [BYTES], "smollm": [DIGITS, BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated",
                   "invert": False}, BYTES | {"use_regex": False}]}
CONTROL, USER_DEFINED = 3, 4             # kinds of tokens, as SentencePiece numbers them


# ---- reading ------------------------------------------------------------------------------------

class Metadata:
    """The keys and tensors of a GGUF file; raises ValueError for a file that is none."""

    def __init__(self, file: str):
        try:
            import gguf
        except ImportError:
            raise ValueError(f"{file} is read by the package gguf: pip install gguf") from None
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such file")
        try:
            reader = gguf.GGUFReader(file)
        except Exception as error:               # a damaged file can raise anything
            raise ValueError(f"{file}: not a GGUF file: {str(error)[:200]}") from None
        self.file, self.fields, self.dequantize = file, reader.fields, gguf.quants.dequantize
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key: str) -> Any:
        if key not in self.fields:
            raise ValueError(f"the key {key} is missing")
        return self.get(key)


def read_rope(metadata: Metadata, theta: float, head_dim: int) -> dict:
    """rope_factor or rope_llama3 of a config.

    llama.cpp stores Llama-3's stretched frequencies as what each is divided by.
    """
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_factor": float(metadata.need("llama.rope.scaling.factor"))}
    if kind != "none":
        raise ValueError(f"rope scaling of type {kind!r} (supported: linear)")
    if "rope_freqs.weight" not in metadata.tensors:
        return {}
    divisors = torch.tensor(metadata.tensors["rope_freqs.weight"].data).double()  # [Dh/2]
    rope, one = Llama3Rope(factor=round(float(divisors.max()), 3)), torch.ones(1)
    # the angles of position 1 are the frequencies: here small enough for their sines to tell them
    angles = [torch.atan2(sin, cos) for cos, sin in (
        rotary_angles(one, head_dim, theta, 1.0, rope), rotary_angles(one, head_dim, theta))]
    if not torch.allclose(angles[1] / angles[0], divisors, rtol=1e-4):
        raise ValueError("rope_freqs.weight are not those of Llama 3.1 to 3.3")
    return {"rope_llama3": rope}


def read_config(metadata: Metadata) -> LlamaConfig:
    """The shape of the model.

    raises   ValueError for an architecture that is not Llama's
    """
    if (kind := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"architecture {kind!r} (supported: llama)")
    if metadata.get("llama.expert_count", 0):
        raise ValueError("a mixture of experts (supported: dense models)")
    heads, width = (metadata.need(f"llama.{key}")
                    for key in ("attention.head_count", "embedding_length"))
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    ends = [metadata.need("tokenizer.ggml.eos_token_id"),
            metadata.get("tokenizer.ggml.eot_token_id")]
    ends = tuple(dict.fromkeys(end for end in ends if end is not None))
    return LlamaConfig(
        vocab_size=len(metadata.need("tokenizer.ggml.tokens")), hidden_size=width,
        intermediate_size=metadata.need("llama.feed_forward_length"),
        num_hidden_layers=metadata.need("llama.block_count"), num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim, max_position_embeddings=metadata.need("llama.context_length"),
        # stored in float32: 1e-5 comes back as 9.999999747e-06
        rms_norm_eps=float(f"{metadata.need('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=theta, tie_word_embeddings="output.weight" not in metadata.tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id", ends[0]),
        eos_token_id=ends[0] if len(ends) == 1 else ends, **read_rope(metadata, theta, head_dim))


def hugging_face_name(name: str) -> str:
    """"blk.0.attn_q.weight" -> "model.layers.0.self_attn.q_proj.weight"; "" for no such tensor."""
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return f"{NAMES[parts[0]]}.weight" if len(parts) == 1 and parts[0] in NAMES else ""


def weights_of(metadata: Metadata, config: LlamaConfig,
               dtype: torch.dtype) -> dict[str, tuple[tuple, Callable[[], Tensor]]]:
    """{name: (shape, what makes the tensor)} of all weights.

    raises   ValueError naming tensors that are missing, unexpected or of another shape
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found, problems = {}, []
    for name, tensor in metadata.tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        target = hugging_face_name(name)
        if name == "rope_freqs.weight":
            continue
        if expected.get(target) != shape:
            problems.append(f"{name} {list(shape)} is unexpected, or of another shape")
        found[target] = tensor
    problems += [f"{name} is missing" for name in expected if name not in found]
    if problems:
        raise ValueError("; ".join(problems[:8]))

    def make(name: str) -> Tensor:
        tensor = found[name]
        weight = torch.tensor(metadata.dequantize(tensor.data, tensor.tensor_type))
        weight = weight.reshape(expected[name]).float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbours, (0, 1), …; here and in transformers (0, Dh/2), …
            pairs = weight.view(-1, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.transpose(1, 2).reshape(expected[name])
        return weight.to(dtype).contiguous()

    return {name: (shape, partial(make, name)) for name, shape in expected.items()}


# ---- tokenizers ---------------------------------------------------------------------------------

def protobuf(number: int, value: int | float | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value % 2 ** 64)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def sentencepiece_model(metadata: Metadata) -> bytes:
    """tokenizer.model: sentencepiece_model.proto's ModelProto, a BPE model with byte fallback."""
    pieces = b"".join(
        protobuf(1, protobuf(1, text.encode()) + protobuf(2, float(score)) + protobuf(3, kind))
        for text, score, kind in zip(*(metadata.need(f"tokenizer.ggml.{key}") for key in (
            "tokens", "scores", "token_type")), strict=True))
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id", default) for name, default in (
        ("unknown", 0), ("bos", 1), ("eos", 2))]
    trainer = protobuf(3, 2) + protobuf(35, 1) + b"".join(
        protobuf(40 + i, number) for i, number in enumerate([*ids, -1]))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = protobuf(1, b"identity") + protobuf(3, int(prefix)) + protobuf(4, 0) + protobuf(
        5, 1)
    return pieces + protobuf(2, trainer) + protobuf(3, normalizer)


def byte_level_json(metadata: Metadata, bos: str | None) -> dict:
    """tokenizer.json of a byte-level BPE; bos: the token that every text starts with."""
    kind = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind not in PRE_TOKENIZERS:
        raise ValueError(f"texts are cut as {kind!r} does it (supported: "
                         f"{', '.join(PRE_TOKENIZERS)})")
    tokens, kinds = (metadata.need(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    numbers = {text: number for number, text in enumerate(tokens)}
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    start = {} if bos is None else {bos: {"id": bos, "ids": [numbers[bos]], "tokens": [bos]}}
    if start:
        single.insert(0, {"SpecialToken": {"id": bos, "type_id": 0}})
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": kinds[number] == CONTROL}
            for text, number in numbers.items() if kinds[number] in (CONTROL, USER_DEFINED)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[kind]},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": single + [
            {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": start},
        "decoder": BYTES, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": kind == "llama-bpe", "vocab": numbers,
            "merges": [merge.split(" ") for merge in metadata.need("tokenizer.ggml.merges")]}}


def write_tokenizer(metadata: Metadata, config: LlamaConfig, folder: str) -> None:
    """The tokenizer's files, and the chat template."""
    kind, tokens = (metadata.need(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    settings = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    bos = settings.get("bos_token")
    if kind == "llama":
        settings["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", True)
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
            file.write(sentencepiece_model(metadata))
    elif kind == "gpt2":
        llama_3 = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
        settings["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", llama_3)
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(os.path.join(folder, "tokenizer.json"),
                   byte_level_json(metadata, bos if settings["add_bos_token"] else None))
    else:
        raise ValueError(f"a tokenizer of kind {kind!r} (supported: llama, gpt2)")
    write_json(os.path.join(folder, "tokenizer_config.json"), settings)
    if template := metadata.get("tokenizer.chat_template"):
        write_text(os.path.join(folder, "chat_template.jinja"), template)
    ends = config.eos_token_id
    write_json(os.path.join(folder, "generation_config.json"), {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(ends) if isinstance(ends, tuple) else ends})


# ---- the command --------------------------------------------------------------------------------

def convert(file: str, out: str, dtype: torch.dtype) -> None:
    """Write the folder `out`; raises ValueError or OSError, one sentence, for what does not fit."""
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already; choose another OUT")
    metadata = Metadata(file)
    try:
        config = read_config(metadata)
        weights = weights_of(metadata, config, dtype)

        def write(folder: str) -> None:
            write_config(config, str(dtype).removeprefix("torch."), folder)
            write_tokenizer(metadata, config, folder)
            write_weights(folder, {name: math.prod(shape) * dtype.itemsize
                                   for name, (shape, _) in weights.items()},
                          lambda name: weights[name][1]())

        write_folder(os.path.abspath(out), write)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    print(f"done: {out} ({config.num_hidden_layers} layers of {config.hidden_size}, "
          f"{config.vocab_size} pieces)")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with locked(os.path.abspath(args.out) + ".lock", args.out):
        convert(args.file, args.out, getattr(torch, args.dtype))


if __name__ == "__main__":
    run_cli(main)
