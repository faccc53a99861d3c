"""A process of its own for each client, as loading one patches another.

It is forked from a server that has imported what all of them need: that takes longer than what most
of them do.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

IMPORTED = ("torch", "compressed_tensors", "transformers.models.llama.modeling_llama")


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module gives there, or the exception that it raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()
