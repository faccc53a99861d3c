"""A hint is an option that gets past the very refusal that it stands under."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.builders import ptq
from tests.cli.tiny_folders import dense_block, ends, llama, llava, mixtral, model_folder

CT, GPTQ, AWQ, GGUF, MLX, ONNX = (
    ("--format", name) for name in ("compressed-tensors", "gptq", "awq", "gguf", "mlx", "onnx")
)


def strange(path: Path) -> Path:
    """Of an unknown family, with a tower that nobody knows as one."""
    tensors = {**ends(), **dense_block("model.layers.0.")}
    block = {name.replace("model.layers", "eyes.blocks"): w for name, w in tensors.items()}
    narrow = {name: w[..., :40].copy() for name, w in block.items() if "mlp.up" in name}
    return model_folder(path, "strange", {**tensors, **narrow})


CASES = [
    (llama, ()), (llama, CT), (llama, GPTQ), (llama, AWQ), (llama, (*CT, "-g", 96)),
    (llama, (*GPTQ, "--asym", "-g", 32)), (llama, (*GPTQ, "--asym", "-b", 5, "-g", 32)),
    (llama, (*GPTQ, "-b", 6)), (llama, (*MLX, "-g", 16)), (llama, (*MLX, "-g", 16, "-b", 7)),
    (llama, (*AWQ, "-b", 8, "-g", 32)), (llama, (*CT, "-g", 0)), (llama, (*AWQ, "-g", 0)),
    (llama, (*CT, "-g", 32, "--include", "embed_tokens")), (llama, (*CT, "--include", "embed")),
    (llama, (*AWQ, "-g", 32, "--include", "lm_head")),
    (llama, (*AWQ, "--include", "lm_head|embed")),
    (llama, (*CT, "-g", 32, "--scale-dtype", "float16")),
    (llama, (*GPTQ, "-g", 32, "--scale-dtype", "bfloat16")),
    (llama, (*MLX, "-b", 8, "-g", 32, "--asym")),
    (llava, (*CT, "-g", 32, "--include", "vision_tower")),
    (llava, (*CT, "-g", 64, "--include", "fc2")),
    (llava, (*GPTQ, "-g", 32, "--include", "vision_tower|lm_head")),
    (strange, (*CT, "-g", 64)), (strange, (*AWQ, "-g", 32)), (strange, (*GPTQ, "-g", 64)),
    (mixtral, CT), (mixtral, (*GPTQ, "-g", 32, "--include", "gate")),
]  # fmt: skip


def ways_out(hint: str) -> list[str]:
    """The hint's ways, each a line of options or words."""
    hint = hint.removesuffix(", which leaves such layers dense")
    hint = hint.removesuffix(", which holds every layer")
    return hint.split(", or ")


def follow(options: list[str], way: str) -> list[str]:
    """The options with one way out taken."""
    if found := re.match(r"leave (.*) out of --include(?: and (.*))?$", way):
        place = options.index("--include")
        kept = [word for word in options[place + 1].split("|") if not left_out(word, found[1])]
        own = ["--include", "|".join(kept)] if kept else []
        options = [*options[:place], *own, *options[place + 2 :]]
        way = found[2] or ""
    return [*options, *shlex.split(way)]


def left_out(word: str, names: str) -> bool:
    return word.rstrip("s") in names or word in names


@pytest.mark.parametrize(("source", "options"), CASES)
def test_every_way_out_leads_out(tmp_path, source, options):
    model = source(tmp_path / "m")
    words = [str(word) for word in options]
    outcome = ptq("rtn", model, *words, "--dry-run", "-o", "out")
    if outcome.code == 0:
        return
    hint = outcome.err.split("ptq: hint: ")[1].strip()
    for way in ways_out(hint):
        again = ptq("rtn", model, *follow(words, way), "--dry-run", "-o", "out")
        assert again.code == 0, (hint, way, again.err)


def hint_of(model: Path, *options: object) -> str:
    outcome = ptq("rtn", model, *options, "-o", "out")
    assert outcome.code == 1
    return outcome.err.split("ptq: hint: ")[1].strip()


def test_a_tower_whose_width_fits_no_group_is_left_out_not_grouped_by_rows(tmp_path):
    tower = hint_of(llava(tmp_path / "a"), *CT, "-g", 32, "--include", "vision_tower")
    unknown = hint_of(strange(tmp_path / "b"), *CT, "-g", 64)
    for hint in (tower, unknown):
        assert hint.startswith("--ignore ")
    assert "--group-size" not in tower


def unheld(path: Path) -> Path:
    """Of a family that has no names in GGUF here."""
    return llama(path, "stablelm")


def test_gguf_is_not_offered_for_models_that_it_does_not_hold(tmp_path):
    """Only GGUF holds rows that end within a group; a next step is no other thing than a hint."""
    for source in (llama, unheld):
        outcome = ptq("rtn", source(tmp_path / source.__name__), "-g", 96, "-o", source.__name__)
        steps = re.findall(r"ptq (pack .*)", outcome.out)
        assert all(ptq(*shlex.split(step), "-o", "x").code == 0 for step in steps)
    outcome = ptq("pack", "unheld", "--format", "awq", "-o", "y")
    assert (outcome.code, "gguf" in outcome.err) == (1, False)


def test_a_model_that_gguf_does_not_hold(tmp_path):
    pytest.importorskip("gguf")
    model = unheld(tmp_path / "m")
    way, two_steps = hint_of(model, *GGUF, "-g", 32).split("; or ")
    assert way == "--format ptq, which holds every model"
    assert "convert_hf_to_gguf.py" in two_steps
    assert ptq("rtn", model, "--format", "ptq", "-g", 32, "-o", "out").code == 0
