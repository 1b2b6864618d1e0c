"""Makes the base model that the demonstration fine-tunes: `python -m trainer.demo.make_base FOLDER`.

A Llama of 0.6M parameters, trained from nothing on right arithmetic of which 60 % reaches the named target.
It therefore can do the sums, knows many solutions of a problem and often ends somewhere else: a small
stand-in for a pretrained model that finds the answer among enough samples. About 200 seconds on two cores.
The same seed gives the same file on the same machine; elsewhere the sums may differ in the last bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.demo import BASE
from trainer.demo.countdown import END, PAD, RESPONSE_TOKENS, ROW_TOKENS, WORDS, make_tokenizer, practice

REACHING = 0.6
STEPS = 800
BATCH = 256
PEAK_RATE = 3e-3
WARM_UP = 60
THREADS = 2


def new_model() -> LlamaForCausalLM:
    """An untrained Llama of 0.6M parameters over the words of the task."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2 * ROW_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=WORDS.index(END),
        pad_token_id=WORDS.index(PAD),
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Token ids `[BATCH, ROW_TOKENS]` of fresh practice rows, without end."""
    texts = (f"{row['prompt']} {row['completion']} {END}" for row in practice(REACHING, seed))
    while True:
        yield tokenizer(list(islice(texts, BATCH)), return_tensors="pt")["input_ids"]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Train the model in place on the responses of `steps` batches; the rate rises, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=min(WARM_UP / steps, 0.5)
    )
    started = time.perf_counter()
    for step, ids_BT in enumerate(islice(batches(tokenizer, seed), steps)):
        labels_BT = ids_BT.clone()
        labels_BT[:, : ROW_TOKENS - RESPONSE_TOKENS] = -100
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  nll {loss.item():.4f}  {seconds:5.0f} s", flush=True)


def make_base(folder: Path, seed: int, steps: int = STEPS) -> None:
    """Train the base model and save it with its tokenizer in `folder`, weights in float32."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = new_model()
    print(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, steps, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the folder and the seed from the command line and make the base model."""
    arguments = argparse.ArgumentParser(description="Make the countdown base model.")
    arguments.add_argument("folder", type=Path, nargs="?", default=BASE)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--steps", type=int, default=STEPS)
    chosen = arguments.parse_args()
    make_base(chosen.folder, chosen.seed, chosen.steps)


if __name__ == "__main__":
    main()
