"""Small models and activations for tests, and the command line called in process.

Files are written by hand here, byte by byte, so that they may also be wrong on purpose.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ptq_cli.cli.main import run

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_data"

PROGRESS = re.compile(r"\[ *\d+/\d+\] ")
WORDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip

# The linears of `small_model`, with the activations they share.
# The files of an output whose model is a bare file.
OUTPUT = ["model.safetensors", "ptq_job.json", "quantization.json", "report.json"]

LINEARS = {
    "layers.0.q_proj": (12, 32),
    "layers.0.k_proj": (6, 32),
    "layers.0.o_proj": (32, 12),
    "layers.0.down_proj": (32, 40),
}
SITES = {"layers.0.q_proj": 32, "layers.0.o_proj": 12, "layers.0.down_proj": 40}


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left behind. err: without the lines of progress"""

    code: int
    out: str
    err: str
    progress: tuple[str, ...] = ()

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        """Each error, and the line of its hint after a semicolon."""
        said = re.findall(r"^ptq: error: .*(?:\nptq: hint: .*)?$", self.err, re.MULTILINE)
        return [error.replace("\nptq: hint: ", "; ") for error in said]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("ptq: warning: ")]


def ptq(*arguments: object) -> Outcome:
    """Run the command line in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
        out.flush(), err.flush()
    said, progress = apart(err.buffer.getvalue().decode())
    return Outcome(code, out.buffer.getvalue().decode(), said, progress)


def apart(stderr: str) -> tuple[str, tuple[str, ...]]:
    """What stands on stderr, and the lines of progress among it: `[3/28] …`."""
    lines = stderr.splitlines(keepends=True)
    progress = [line for line in lines if PROGRESS.match(line)]
    said = "".join(line for line in lines if line not in progress)
    return said, tuple(line.rstrip("\n") for line in progress)


def raw_safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from a header as it stands (bytes, or what becomes JSON)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] = {}) -> bytes:
    """A good safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, array in tensors.items():
        content = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": WORDS[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return raw_safetensors(header, data)


def overwrite(path: Path, content: bytes) -> None:
    """New content for a file: ext4 writes one that was truncated to the disk before going on."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def write_model(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] = {}
) -> Path:
    path.write_bytes(safetensors(tensors, metadata))
    return path


def read_model(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name → (dtype, shape, bytes), read without this project's code."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def random_weight(*shape: int, seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    rng = np.random.default_rng((seed, *shape))
    return (0.02 * rng.standard_normal(shape)).astype(dtype)


def random_inputs(n_tokens: int, width: int, seed: int = 0, dtype: Any = np.float16) -> np.ndarray:
    """Correlated inputs, so that compensating errors pays."""
    rng = np.random.default_rng((seed, width))
    mixing = rng.standard_normal((width, width)) / np.sqrt(width)
    spread = np.exp(rng.standard_normal(width) / 2)
    tokens = np.random.default_rng((seed + 1, n_tokens, width)).standard_normal((n_tokens, width))
    return ((tokens @ mixing + tokens) * spread).astype(dtype)


def small_tensors() -> dict[str, np.ndarray]:
    """Four linears, an embedding, a norm, an output head and an integer buffer."""
    return {
        "embed_tokens.weight": random_weight(50, 32, seed=1),
        **{f"{name}.weight": random_weight(*shape) for name, shape in LINEARS.items()},
        "layers.0.q_proj.bias": random_weight(12, seed=2, dtype=np.float32),
        "layers.0.input_layernorm.weight": np.ones(32, np.float32),
        "positions": np.arange(7),
        "lm_head.weight": random_weight(50, 32, seed=3),
    }


def small_model(path: Path, **changes: np.ndarray | None) -> Path:
    """`small_tensors` in a file; changes by tensor name (None leaves it out)."""
    tensors = {**small_tensors(), **changes}
    return write_model(path, {k: v for k, v in tensors.items() if v is not None})


def small_activations(folder: Path, n_tokens: int = 96, **changes: np.ndarray) -> Path:
    """`<site>.npy` for every site of `small_model`; changes by site."""
    folder.mkdir(exist_ok=True)
    for site, width in SITES.items():
        np.save(folder / f"{site}.npy", changes.get(site, random_inputs(n_tokens, width)))
    return folder


def small_job(folder: Path) -> tuple[Path, Path]:
    """`model.safetensors` and `acts/` in a folder."""
    return small_model(folder / "model.safetensors"), small_activations(folder / "acts")


def copy_sample(target: Path) -> Path:
    """sample_data without what a run may have left in it."""
    skip = shutil.ignore_patterns("*.calibration.safetensors", "*-w[2-8]*", "*.partial")
    shutil.copytree(SAMPLE, target, ignore=skip)
    return target


def half_sample(target: Path, blocks: int = 2) -> Path:
    """`copy_sample` with the first of the four blocks: each has 7 layers at 4 sites."""
    copy_sample(target)
    gone = tuple(f"model.layers.{block}." for block in range(blocks, 4))
    header, arrays = read_model(target / "model.safetensors"), {}
    for name, (dtype, shape, content) in header.items():
        if not name.startswith(gone):
            assert dtype == "BF16"
            arrays[name] = np.frombuffer(content, ml_dtypes.bfloat16).reshape(shape)
    write_model(target / "model.safetensors", arrays)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    for path in (target / "activations").iterdir():
        if path.name.startswith(gone):
            path.unlink()
    return target


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its relative path."""
    return {
        os.path.relpath(os.path.join(top, name), folder): Path(top, name).read_bytes()
        for top, _, names in os.walk(folder)
        for name in names
        if Path(top, name).is_file()
    }
