"""Every architecture, quantized without a word about its layers and loaded by its clients: no key
is missing or left over, and logits are the twin's.

`python -m tests.interop.test_architectures` writes the results into loaded.json, of which
docs/models.md is made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ptq_cli.models.families import family_of
from tests.builders import ptq
from tests.interop.compare import compare_all
from tests.interop.own_process import in_own_process
from tests.interop.tiny_models import MODELS, write_models

NEEDED = ("torch", "transformers", "compressed_tensors", "gptqmodel", "mlx_lm")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs the extra interop"),
]

KEPT = Path(__file__).with_name("loaded.json")
TOLERANCE = 1e-3
TOLERANCES = {"transformers": TOLERANCE, "gptqmodel": 2e-3, "GPTQModel": 1e-2, "mlx": TOLERANCE}
COMMANDS = (("pack", "compressed-tensors"), ("rtn", "compressed-tensors"))
# A dense model, a mixture and one with images in the other formats, each by a client that reads it.
OTHERS = (
    *(("pack", name, fmt, "gptqmodel") for name in ("qwen3", "llava") for fmt in ("gptq", "awq")),
    *(("pack", "qwen3_moe", fmt, "GPTQModel") for fmt in ("gptq", "awq")),
    *(("pack", name, "mlx", "mlx") for name in ("qwen3", "mixtral", "llava")),
)
CLIENTS = {"gptqmodel": "transformers with GPTQModel", "GPTQModel": "GPTQModel", "mlx": "mlx-lm"}
CASES = [
    *((command, name, fmt, "transformers") for command, fmt in COMMANDS for name in MODELS),
    *OTHERS,
]
# Why a model is refused before any work.
REFUSED = {
    "gpt_oss": "transformers reads the experts of gpt_oss only fused and in floating point",
    "gemma3n_text": "group_size 32 does not divide in_features 8",
    "gpt2": "holds weights stored [out, in], not [in, out]",
}
# Whose heads are quantized, too → model_type.
WITH_HEADS = {"tied_llama": "llama", "llama": "llama", "gpt_neox": "gpt_neox"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tried(tmp_path_factory.mktemp("architectures"))


def tried(folder: Path) -> dict[str, Any]:
    """What became of each case: the error that refused it, or what `compare` found; and the family
    of each model."""
    write_models(folder / "float", [])
    found: dict[str, Any] = {name: taken_for(folder / "float" / name) for name in MODELS}
    jobs: dict[str, list[dict[str, str]]] = {}  # one client patches what another loads
    for command, name, fmt, client in CASES:
        source, out = folder / "float" / name, folder / f"{command}-{name}-{fmt}"
        outcome = ptq(command, source, "-o", out, "--format", fmt, "--group-size", 32)
        if outcome.code == 0:
            job = {"name": out.name, "client": client, "float": str(source), "folder": str(out)}
            jobs.setdefault(client, []).append(job)
        else:
            assert outcome.code == 1
            assert not list(folder.glob(f"{out.name}*"))
            found[out.name] = {"refused": outcome.errors[0]}
    jobs["transformers"] += [with_head(folder, name) for name in WITH_HEADS]
    for own in jobs.values():
        found |= in_own_process(compare_all, own)
    return found


def taken_for(folder: Path) -> dict[str, str]:
    """What config.json says that a model is, and the family it is taken for."""
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config)
    return {"model_type": config["model_type"], "family": family.name if family else ""}


def with_head(folder: Path, name: str) -> dict[str, str]:
    """A head that was tied has a tensor of its own first, equal to the embedding."""
    from safetensors.numpy import load_file, save_file

    source, out = folder / "untied" / name, folder / f"heads-{name}"
    shutil.copytree(folder / "float" / name, source)
    if name.startswith("tied"):
        weights = source / "model.safetensors"
        tensors = load_file(weights)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        save_file(tensors, weights, metadata={"format": "pt"})
    options = ["--format", "compressed-tensors", "--group-size", 32]
    head = "embed_out" if name == "gpt_neox" else "lm_head"
    assert ptq("pack", source, "-o", out, *options, "--include", head).code == 0
    return {"name": out.name, "float": str(source), "folder": str(out)}


@pytest.mark.parametrize(("command", "name", "fmt", "client"), CASES)
def test_the_client_computes_what_was_written(
    results: dict[str, Any], command: str, name: str, fmt: str, client: str
) -> None:
    result = results[f"{command}-{name}-{fmt}"]
    if name in REFUSED:
        assert REFUSED[name] in result["refused"]
        return
    assert "refused" not in result, result
    assert "raised" not in result, result
    assert (result["missing"], result["unexpected"]) == ([], [])
    assert result["error"] <= TOLERANCES[client]


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_that_are_quantized(results: dict[str, Any], name: str) -> None:
    result = results[f"heads-{name}"]
    assert "raised" not in result, result
    assert (result["missing"], result["unexpected"]) == ([], [])
    assert result["error"] <= TOLERANCE


def test_the_results_that_docs_are_made_of(results: dict[str, Any]) -> None:
    assert json.loads(KEPT.read_text("utf-8")) == kept(results)


def kept(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of each model what it is taken for, and who loaded it or why it is refused."""
    return {name: {**results[name], "loaded": _loaded(results, name)} for name in MODELS}


def _loaded(results: dict[str, Any], name: str) -> str:
    """`transformers, MLX`, if every quantized folder of the model was loaded."""
    said = dict.fromkeys(_said(results[f"{command}-{name}-{fmt}"]) for command, fmt in COMMANDS)
    others = {CLIENTS[client]: None for _, own, _, client in OTHERS if own == name}
    return ", ".join((*said, *others))


def _said(result: dict[str, Any]) -> str:
    if "refused" in result:
        reason = result["refused"].removeprefix("ptq: error: ").split("; ")[0]
        return f"refused: {reason.split(': ', 1)[1]}"
    if "raised" in result or result["missing"] or result["unexpected"]:
        return "not by transformers"
    return "transformers" if result["error"] == 0 else "transformers, within 1e-3"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = kept(tried(Path(place)))
    KEPT.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", "utf-8")
