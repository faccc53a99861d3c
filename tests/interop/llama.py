"""llama.cpp in a process of its own: `python -m tests.interop.llama JOBS.json OUT.npz`.

The wheel of xllamacpp exports the functions of libllama. JOBS is a list of `{"name", "path"}`; OUT
gets `<name>`, float32 logits [len(TOKENS), vocabulary], and `<name>.generated`, the NEW_TOKENS that
it thinks most likely after TOKENS, one after the other.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKENS = [int(token) for token in np.random.default_rng(11).integers(0, 90, 64)]
NEW_TOKENS = 16
_LENGTH = 128  # of the context
_WORDS = 128  # 32-bit words, more than a structure of parameters has in any version


class _Parameters(ctypes.Structure):
    """Passed by value; the library fills it in, whatever its fields are."""

    _fields_ = [("words", ctypes.c_uint32 * _WORDS)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Parameters]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Parameters]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "llama_batch_free": (None, [_Batch]),
}
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def library() -> Any:
    """libllama, as it stands in the wheel."""
    from xllamacpp import xllamacpp

    found = ctypes.CDLL(xllamacpp.__file__)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_SILENT, None)
    return found


def _context_parameters(llama: Any) -> _Parameters:
    """Of one sequence on one thread: the first words are n_ctx, n_batch, n_ubatch and n_seq_max;
    a little behind them n_threads and n_threads_batch are 4 each."""
    parameters = llama.llama_context_default_params()
    words = parameters.words
    threads = next(i for i in range(4, 12) if words[i] == words[i + 1] == 4)
    words[0] = words[1] = words[2] = _LENGTH
    words[3] = words[threads] = words[threads + 1] = 1
    return parameters


def run(llama: Any, path: str) -> tuple[NDArray[np.float32], list[int]]:
    """Logits of every one of TOKENS, and what comes after them."""
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    context = llama.llama_init_from_model(model, _context_parameters(llama))
    batch, place = llama.llama_batch_init(_LENGTH, 0, 1), 0

    def decode(tokens: list[int]) -> NDArray[np.float32]:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, place + i
            batch.n_seq_id[i], batch.logits[i] = 1, 1
            batch.seq_id[i][0] = 0
        if llama.llama_decode(context, batch) != 0:
            raise RuntimeError(f"llama.cpp does not run {path}")
        values = llama.llama_get_logits(context)
        return np.ctypeslib.as_array(values, (len(tokens), size)).copy()

    logits = decode(TOKENS)
    place, generated = len(TOKENS), [int(logits[-1].argmax())]
    while len(generated) < NEW_TOKENS:
        generated.append(int(decode(generated[-1:])[-1].argmax()))
        place += 1
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits, generated


if __name__ == "__main__":
    jobs_file, out_file = sys.argv[1:]
    results: dict[str, Any] = {}
    llama = library()
    for job in json.loads(Path(jobs_file).read_text()):
        results[job["name"]], results[f"{job['name']}.generated"] = run(llama, job["path"])
    np.savez(out_file, **results)
