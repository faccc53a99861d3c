"""Train a small Qwen2 on the source of Python's standard library: a second model to judge by.

    python benchmarks/train_model.py DIR
    python benchmarks/accuracy.py --model DIR

About 2.9 million parameters: hidden 256, 4 layers, 4 heads over 2 key/value heads, biases on q, k
and v, tied head, bfloat16; the tokenizer is that of `sample_data`. A tenth of the library's
modules, by a hash of their names, is not trained on and gives the evaluation tokens. torch and
transformers have to be installed; 600 steps of 16 sequences take about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).parents[1] / "sample_data"
LENGTH = 256
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def read_library() -> tuple[list[str], list[str]]:
    """The library's modules, those to train on and those held out."""
    top = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(top.rglob("*.py")):
        inside = path.relative_to(top)
        if LEFT_OUT.isdisjoint(inside.parts) and "encodings" not in inside.parts:
            text = path.read_text("utf-8", errors="replace")
            parts[zlib.crc32(inside.as_posix().encode()) % 10 == 0].append(text)
    return parts


def sequences(texts: list[str]) -> np.ndarray:
    """Token ids, [n, LENGTH]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    found = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = np.concatenate([np.array(one.ids, np.uint16) for one in found])
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(given.seed)
    rng = np.random.default_rng(given.seed)
    training, heldout = map(sequences, read_library())
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), given.rate, (0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.rate, given.steps)
    start = time.perf_counter()
    for step in range(given.steps):
        drawn = torch.from_numpy(
            training[rng.integers(len(training), size=given.batch)].astype(int)
        )
        loss = model(drawn, labels=drawn).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == given.steps - 1:
            print(
                f"{step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True
            )

    model.to(torch.bfloat16).save_pretrained(given.folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLE / name, given.folder)
    for name, ids, count in (("calibration", training, 64), ("eval", heldout, 128)):
        chosen = np.sort(rng.choice(len(ids), min(count, len(ids)), replace=False))
        np.save(given.folder / f"{name}_tokens.npy", ids[chosen])


if __name__ == "__main__":
    main()
