"""A process of its own for each client, as loading one patches another.

It is forked from a server that has imported what all of them need: that takes longer than what most
of them do.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

# GPTQModel compiles the loop that unpacks each layer, which takes 20 times as long as running it;
# the blocks of docs/loading.md compile it.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # the next process has it compiled
}  # fmt: skip
IMPORTED = ("torch", "compressed_tensors", "transformers.models.llama.modeling_llama")


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module gives there, or the exception that it raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with patch.dict(os.environ, ENVIRONMENT), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()
