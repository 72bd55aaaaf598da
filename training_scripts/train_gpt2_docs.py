"""Train `gpt2_docs`, the GPT-2 that the package ships, on the documentation of installed packages.

    python training_scripts/train_gpt2_docs.py      # writes mlx_zoo/data/gpt2_docs/

A folder in transformers' format: GPT2LMHeadModel with float16 weights, byte-level BPE, and in it

    facts.json             where it comes from, and its perplexity on files that were held out
    evidence.safetensors   what the PyTorch original answers to a few inputs

A document is what one docstring says in prose; between documents stands <|endoftext|>. No recipe
was searched for; the steps were doubled once, with the perplexity of a first attempt in view.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import documentation
import fitting
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn import functional as F

from mlx_zoo.verify.reference import import_torchvision

import_torchvision()  # transformers imports it
import transformers  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NAME = "gpt2_docs"
END = "<|endoftext|>"  # id 0
NETWORK = {"vocab_size": 1024, "n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4}
NUM_STEPS, BATCH_SIZE, LR = 5000, 8, 3e-3
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": END,
    "eos_token": END,
    "model_max_length": NETWORK["n_positions"],
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": END,
}


def documents(held_out: bool) -> list[str]:
    return [
        "\n".join(documentation.plain(paragraph) for paragraph in paragraphs)
        for docstring, paragraphs in documentation.prose()
        if docstring.held_out == held_out
    ]


def stream(tokenizer: ByteLevelBPETokenizer, texts: list[str]) -> np.ndarray:
    """All documents in a row, each with END before it, (N,)."""
    return np.array([i for x in tokenizer.encode_batch(texts) for i in (0, *x.ids)])


def windows(ids: np.ndarray) -> np.ndarray:
    """(B, 257): what is read, and the token after it. They overlap by one token."""
    length = NETWORK["n_positions"]
    num = (len(ids) - 1) // length
    return ids[np.arange(num)[:, None] * length + np.arange(length + 1)]


def batches(ids: np.ndarray, random: np.random.Generator) -> Iterator[Tensor]:
    """Windows in another order and from another beginning each time round."""
    while True:
        rows = windows(ids[random.integers(NETWORK["n_positions"]) :])
        order = random.permutation(len(rows))
        for i in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            yield torch.from_numpy(rows[order[i : i + BATCH_SIZE]])


def baselines(ids: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Perplexity of counted tokens, and of counted pairs backed by them (weight 16 tokens)."""
    size = NETWORK["vocab_size"]
    counts = np.bincount(ids, minlength=size) + 1.0
    unigram = counts / counts.sum()
    pairs = np.zeros((size, size))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    bigram = (pairs + 16 * unigram) / (pairs.sum(axis=1, keepdims=True) + 16)
    before, after = rows[:, :-1], rows[:, 1:]
    return {
        "baseline_unigram_perplexity": round(float(np.exp(-np.log(unigram[after]).mean())), 2),
        "baseline_bigram_perplexity": round(
            float(np.exp(-np.log(bigram[before, after]).mean())), 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=fitting.DATA, help="directory to write into")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"default {NUM_STEPS}")
    args = parser.parse_args()
    folder = args.output / NAME
    folder.mkdir(parents=True, exist_ok=True)

    texts = documents(held_out=False)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, NETWORK["vocab_size"], special_tokens=[END], show_progress=False
    )
    tokenizer.save_model(str(folder))
    files = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("vocab.json", "merges.txt")
    }
    files["tokenizer_config.json"] = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    ids = stream(tokenizer, texts)

    fitting.make_deterministic(0)
    config = transformers.GPT2Config(
        **NETWORK, bos_token_id=0, eos_token_id=0, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)

    def nll(rows: Tensor) -> Tensor:
        logits = model(rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    order = batches(ids, np.random.default_rng(0))
    fitting.fit(model, nll, order, args.steps, lr=LR, weight_decay=0.1)
    model = fitting.as_stored(model)

    rows = windows(stream(tokenizer, documents(held_out=True)))
    with torch.inference_mode():
        losses = [float(nll(torch.from_numpy(row[None]))) for row in rows]
    score = {
        "tokens": rows[:, 1:].size,
        "perplexity": round(float(np.exp(np.mean(losses))), 2),
        **baselines(ids, rows),
    }
    inputs = torch.from_numpy(rows[:3, :48])
    answers = fitting.evidence(
        model, {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}, ("logits",)
    )
    training = {
        "num_tokens": len(ids),
        "steps": args.steps,
        "batch_size": BATCH_SIZE,
        "window": NETWORK["n_positions"],
        "lr": LR,
        "optimizer": "AdamW",
        "seed": 0,
        "num_threads": fitting.NUM_THREADS,
    }
    script = f"training_scripts/{Path(__file__).name}"
    facts = {"script": script, "architecture": NETWORK, "held_out": score, "training": training}
    fitting.write_folder(folder, model, files, answers, facts)


if __name__ == "__main__":
    main()
