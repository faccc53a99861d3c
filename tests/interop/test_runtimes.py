"""What this tool writes, loaded by the clients it is written for.

Each folder's logits are those of the float model with the dequantized weights, within what the
client's own arithmetic costs. Every client works in one process for all of its folders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq_cli.commands import api
from ptq_cli.storage.folder import open_quantized
from tests.interop import clients
from tests.interop.clients import NEW_TOKENS, PROMPT
from tests.interop.own_process import in_own_process

NEEDED = ("torch", "transformers", "gptqmodel", "compressed_tensors", "gguf", "mlx_lm")
# Marks, not a skip of the module: tests/docs/test_docs.py reads CASES where none is installed.
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs the extra interop"),
]

ROOT = Path(__file__).parent.parent.parent
SAMPLE, QWEN = "llama", "qwen2"
# Relative error of the logits that a client's arithmetic costs.
TOLERANCES = {
    "transformers": 1e-6,
    "transformers+gptqmodel": 2e-3,
    "gptqmodel": 5e-3,
    "mlx": 1e-5,
}


@dataclass(frozen=True)
class Case:
    """A folder to be made, and the client that loads it."""

    client: str
    format: str
    model: str
    bits: int
    group: int = 32
    sym: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    rounded: bool = False  # the client rounds what it dequantizes to the model's dtype
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        words = [
            self.format,
            self.model,
            f"w{self.bits}g{self.group}",
            "sym" if self.sym else "asym",
        ]
        words += [f"{key}={value}" for key, value in sorted(self.extra.items())]
        return "".join(c if c.isalnum() or c in "-=_" else "_" for c in "-".join(words))

    @property
    def reference(self) -> str:
        return f"{self.folder}-rounded" if self.rounded else self.folder

    @property
    def name(self) -> str:
        return "-".join([self.client, self.folder, *map(str, self.job)])


PLAINLY: dict[str, Any] = {"refine": 0, "sweeps": 0, "mse": False}  # so that a run takes less
LEFT_DENSE = {"ignore": ("layers.1.mlp.down_proj",)}
MIXED = {"layers": ({"match": "down_proj", "bits": 8, "group_size": 64},)}
DESC = {"act_order": "desc"}

CASES = [
    *(
        Case(client, "gptq", model, bits, group)
        for bits, group, model in (
            (2, 32, QWEN), (3, 128, SAMPLE), (4, 128, SAMPLE), (4, -1, QWEN), (8, 64, QWEN),
        )
        for client in ("transformers+gptqmodel", "gptqmodel")
    ),
    *(
        Case(client, "gptq_v2", model, bits, group, sym=False)
        for bits, group, model in ((2, 64, SAMPLE), (3, 32, QWEN), (4, 64, QWEN), (8, 128, SAMPLE))
        for client in ("transformers+gptqmodel", "gptqmodel")
    ),
    Case("transformers+gptqmodel", "gptq", SAMPLE, 4, 128, tolerance=3e-2, job={"plain": True}),
    Case("transformers+gptqmodel", "gptq", SAMPLE, 4, 64, extra=DESC),
    Case("transformers+gptqmodel", "gptq_v2", SAMPLE, 3, 32, sym=False, extra=DESC),
    Case("transformers+gptqmodel", "gptq_v2", SAMPLE, 4, 128),
    Case("transformers+gptqmodel", "gptq", QWEN, 4, 32, extra=LEFT_DENSE),
    Case("gptqmodel", "gptq", QWEN, 4, 32, extra=LEFT_DENSE),
    Case("gptqmodel", "gptq", SAMPLE, 4, 128, extra=MIXED),
    Case("gptqmodel", "gptq", SAMPLE, 4, 32, extra={"include": ("lm_head",)}),
    *(
        Case(client, "awq", model, 4, group, sym)
        for group, sym, model in ((128, True, SAMPLE), (32, False, QWEN), (-1, False, SAMPLE))
        for client in ("transformers+gptqmodel", "gptqmodel")
    ),
    Case("transformers+gptqmodel", "awq", QWEN, 4, 64, sym=False, extra=LEFT_DENSE),
    Case("mlx", "awq", SAMPLE, 4, 64, sym=False, tolerance=2e-2),
    Case("mlx", "awq", QWEN, 4, 32, tolerance=2e-2),
    *(
        Case("transformers", "compressed-tensors", model, bits, group)
        for bits, group, model in (
            (2, 32, SAMPLE), (3, -1, QWEN), (4, 128, SAMPLE), (4, 32, QWEN), (5, 32, SAMPLE),
            (6, 64, QWEN), (7, -1, SAMPLE), (8, 128, QWEN),
        )
    ),
    *(
        Case("transformers", "compressed-tensors", model, bits, group, sym=False, rounded=True)
        for bits, group, model in (
            (2, 32, QWEN), (3, 32, SAMPLE), (4, 128, SAMPLE), (5, 64, QWEN), (6, 128, SAMPLE),
            (7, 32, QWEN), (8, -1, QWEN),
        )
    ),
    Case("transformers", "compressed-tensors", QWEN, 4, 32, extra=LEFT_DENSE),
    Case("transformers", "compressed-tensors", SAMPLE, 4, 128, extra=MIXED),
    *(
        Case("mlx", "mlx", model, bits, group, sym)
        for bits, group, sym, model in (
            (2, 32, False, SAMPLE), (2, 64, True, QWEN), (3, 64, False, QWEN),
            (3, 128, True, SAMPLE), (4, 128, True, SAMPLE), (4, 64, False, QWEN),
            (5, 32, True, QWEN), (5, 64, False, SAMPLE), (6, 128, False, SAMPLE),
            (6, 32, True, QWEN), (8, 32, True, SAMPLE), (8, 64, False, QWEN),
        )
    ),
    *(
        Case("transformers", "gguf", model, bits, group, sym, job={"gguf": True})
        for bits, group, sym, model in (
            (4, 32, True, SAMPLE), (4, 128, True, SAMPLE), (4, 32, False, QWEN),
            (5, 32, True, QWEN), (5, 64, False, SAMPLE), (8, 32, True, QWEN), (8, -1, True, SAMPLE),
        )
    ),
    Case("transformers", "gguf", QWEN, 4, 32, extra=LEFT_DENSE, job={"gguf": True}),
    Case("mlx", "mlx", QWEN, 4, 32, extra=LEFT_DENSE),
    Case("mlx", "mlx", SAMPLE, 4, 128, extra={**MIXED, "include": ("embed_tokens",)}),
]  # fmt: skip


def make_qwen(folder: Path) -> None:
    """A small random Qwen2 with biases and tied embeddings, saved by transformers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, initializer_range=0.08,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, values in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(values, std=0.1)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "sample_data" / name).read_bytes())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    qwen = tmp_path_factory.mktemp("models") / "qwen2"
    make_qwen(qwen)
    return {SAMPLE: ROOT / "sample_data", QWEN: qwen}


def quantize(case: Case, model: Path, out: Path) -> None:
    if out.exists():
        return
    grid = {"bits": case.bits, "group_size": case.group, "sym": case.sym}
    if case.model == SAMPLE:
        api.gptq(model, **grid, **PLAINLY, format=case.format, output=out, **case.extra)
    else:
        api.rtn(model, **grid, mse=False, format=case.format, output=out, **case.extra)


def mirrored_share(out: Path) -> float:
    """How many of a symmetric folder's groups are mirrored."""
    folder = open_quantized(out)
    found = [
        (folder.load(module).zeros == layer.grid.mid_code - 1).reshape(-1)
        for module, layer in folder.layers.items()
    ]
    return float(np.concatenate(found).mean())


Outcome = Callable[[Case], tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="session")
def outcome(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a case's client and the reference gave; both have seen all folders by then."""
    folder = tmp_path_factory.mktemp("folders")
    done: dict[str, dict[str, Any]] = {}

    def job(case: Case, name: str) -> dict[str, Any]:
        path = folder / case.folder
        quantize(case, models[case.model], path)
        assert not case.sym or mirrored_share(path) > 0.25
        own = {"name": name, "folder": str(path), "float": str(models[case.model])}
        return own | {"format": case.format, "bits": case.bits, "rounded": case.rounded, **case.job}

    def of(client: str, cases: list[Case]) -> dict[str, Any]:
        if client not in done:
            names = [case.reference if client == "reference" else case.name for case in cases]
            jobs = {name: job(case, name) for name, case in zip(names, cases, strict=True)}
            done[client] = in_own_process(clients.results, client, list(jobs.values()))
        return done[client]

    def find(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
        own = of(case.client, [other for other in CASES if other.client == case.client])
        return own, of("reference", CASES)

    return find


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits(case: Case, outcome: Outcome) -> None:
    results, references = outcome(case)
    assert f"{case.name}.error" not in results, results[f"{case.name}.error"]
    assert f"{case.reference}.error" not in references, references[f"{case.reference}.error"]
    ours, theirs = references[case.reference], results[case.name]
    error = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    print(f"{case.name}: {error:.2e}")
    assert error <= (TOLERANCES[case.client] if case.tolerance is None else case.tolerance)
    generated = results[f"{case.name}.generated"]
    if case.client != "mlx":
        assert generated.shape == (1, len(PROMPT[0]) + NEW_TOKENS)
