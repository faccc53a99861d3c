"""ggml's own decoder and its check of rows, and llama.cpp's forward, in the wheel of xllamacpp.

Its functions are called through ctypes. Structures of parameters that are handed over by value are
opaque here, longer than any version of them, filled by the library: of a context's the first four
words are n_ctx, n_batch, n_ubatch and n_seq_max, and a pair of fours the numbers of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.storage.gguf_file import NUMBERS

Decode = Callable[[Sequence[int]], NDArray[np.float32]]


class _Parameters(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * 128)]


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


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
_SIGNATURES = {
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Parameters]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Parameters]),
    "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_batch_free": (None, [_Batch]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_free": (None, [ctypes.c_void_p]),
}


@cache
def _library() -> ctypes.CDLL:
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.llama_log_set(_SILENT, None)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def decoded(kind: str, packed: NDArray[np.uint8], columns: int) -> NDArray[np.float32]:
    """Values [rows, columns] of rows of blocks, uint8 [rows, bytes]."""
    lower = kind.lower()
    name = f"dequantize_row_{lower[:-1]}K" if kind.endswith("_K") else f"dequantize_row_{lower}"
    decode = getattr(_library(), name)
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode.restype = None
    rows, values = np.ascontiguousarray(packed), np.empty((len(packed), columns), np.float32)
    decode(rows.ctypes.data, values.ctypes.data, values.size)
    return values


def quantized(
    kind: str, weight: NDArray[np.float32], importance: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Blocks by ggml's own quantizer, uint8 [rows, bytes]; importance: of columns, float32"""
    library, (rows, columns) = _library(), weight.shape
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_row_size.restype = ctypes.c_size_t
    make = library.ggml_quantize_chunk
    make.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    make.restype = ctypes.c_size_t
    packed = np.zeros((rows, library.ggml_row_size(NUMBERS[kind], columns)), np.uint8)
    values, weights = (np.ascontiguousarray(x, np.float32) for x in (weight, importance))
    places = (values.ctypes.data, packed.ctypes.data)
    assert make(NUMBERS[kind], *places, 0, rows, columns, weights.ctypes.data) == packed.nbytes
    return packed


def is_valid(kind: str, packed: NDArray[np.uint8]) -> bool:
    """Whether llama.cpp takes these rows for sound (`--check-tensors`)."""
    check = _library().ggml_validate_row_data
    check.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    check.restype = ctypes.c_bool
    rows = np.ascontiguousarray(packed)
    return bool(check(NUMBERS[kind], rows.ctypes.data, rows.nbytes))


@contextmanager
def opened(path: Path, length: int, vocabulary: int) -> Iterator[Decode]:
    """A model that llama.cpp has loaded, and a sequence in it of at most so many tokens. What is
    yielded takes the next tokens and gives logits, [tokens, vocabulary]."""
    library, place = _library(), count()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    assert model, f"llama.cpp does not load {path}"
    parameters = library.llama_context_default_params()
    words = parameters.words
    threads = next(i for i in range(4, 12) if words[i] == words[i + 1] == 4)
    words[0] = words[1] = words[2] = length
    words[3] = words[threads] = words[threads + 1] = 1
    context = library.llama_init_from_model(model, parameters)
    assert context
    batch = library.llama_batch_init(length, 0, 1)

    def decode(tokens: Sequence[int]) -> NDArray[np.float32]:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, next(place), 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        assert library.llama_decode(context, batch) == 0
        found = library.llama_get_logits(context)
        return np.ctypeslib.as_array(found, (len(tokens), vocabulary)).copy()

    yield decode
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)


def logits(path: Path, tokens: Sequence[int], vocabulary: int) -> NDArray[np.float32]:
    """What llama.cpp gives at every place of one sequence, [length, vocabulary]."""
    with opened(path, len(tokens), vocabulary) as decode:
        return decode(tokens)


class Vocabulary:
    """The tokenizer of a GGUF file, as llama.cpp reads it."""

    def __init__(self, path: Path) -> None:
        library = _library()
        library.llama_model_get_vocab.restype = ctypes.c_void_p
        library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        library.llama_tokenize.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
        ]  # fmt: skip
        self._model = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        assert self._model, f"llama.cpp does not load {path}"
        self._vocabulary = library.llama_model_get_vocab(self._model)

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """special: with what the tokenizer puts before and behind a text"""
        data, found = text.encode(), (ctypes.c_int32 * (len(text.encode()) + 8))()
        tokenize = _library().llama_tokenize
        count = tokenize(self._vocabulary, data, len(data), found, len(found), special, True)
        assert count >= 0
        return list(found[:count])

    def close(self) -> None:
        _library().llama_model_free(self._model)
