"""Messages for real models: names folded, each reason once, what to do last on its own line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from ptq_cli.errors import InputError, NumericalError
from ptq_cli.formats.runtimes.artifact import Fact
from tests.builders import ptq, random_weight, write_model

KINDS = {
    **{f"self_attn.{kind}_proj": (8, 12) for kind in "qkvo"},
    **{f"mlp.{kind}_proj": (12, 12) for kind in ("gate", "up", "down")},
}
MISSING = "model.layers.{3-99}.{mlp.{down,gate,up}_proj, self_attn.{"
ALL = "model.layers.{0-99}.{mlp.{down,gate,up}_proj, self_attn.{k,o,q,v}_proj}"


def model(path: str, layers: int, **changes: np.ndarray) -> str:
    """A llama of so many layers, its tensors sorted by letter as other tools sort them."""
    tensors = {
        f"model.layers.{i}.{kind}.weight": random_weight(*shape)
        for i in range(layers)
        for kind, shape in KINDS.items()
    }
    write_model(Path(path), dict(sorted({**tensors, **changes}.items())))
    return path


def activations(folder: str, layers: range, width: int = 12) -> str:
    Path(folder).mkdir()
    inputs = np.random.default_rng(0).standard_normal((16, width)).astype(np.float32)
    for i in layers:
        for kind in KINDS:
            np.save(Path(folder) / f"model.layers.{i}.{kind}.npy", inputs)
    return folder


def error(*command: object, code: int = 1, words: list[str], hint: str | None) -> None:
    """The command fails with an error of under 500 characters, and with what to do on a line."""
    outcome = ptq(*command)
    assert outcome.code == code, outcome.err
    lines = outcome.err.splitlines()
    said = [line for line in lines if not line.startswith("ptq: warning: ")]
    assert len(said) == (1 if hint is None else 2), outcome.err
    assert said[0].startswith("ptq: error: ")
    for word in words:
        assert word in said[0], outcome.err
    if hint is not None:
        assert said[1] == f"ptq: hint: {hint}"
    assert max(map(len, lines)) < 500
    assert len("".join(said)) < 500


def test_a_group_size_that_does_not_divide():
    error(
        *("rtn", model("m.safetensors", 100), "-g", 8, "--format", "gptq", "-o", "out"),
        words=[f"700 layers: group_size 8 does not divide in_features 12, as gptq needs: {ALL}"],
        hint="--format ptq, which holds every layer",  # 12 columns fill no whole words in any group
    )


def test_each_reason_has_its_count():
    wide = {f"model.layers.{i}.mlp.down_proj.weight": random_weight(8, 20) for i in range(100)}
    error(
        *("rtn", model("m.safetensors", 100, **wide), "-g", 8, "--format", "gptq", "-o", "out"),
        words=[
            " 600 layers: group_size 8 does not divide in_features 12, as gptq needs: model.",
            "; 100 layers: group_size 8 does not divide in_features 20, as gptq needs:"
            " model.layers.{0-99}.mlp.down_proj",
        ],
        hint="--format ptq, which holds every layer",
    )


def test_layers_without_a_pattern_are_counted():
    rng = np.random.default_rng(5)
    names = [f"model.layers.{i}.{kind}.weight" for i in range(100) for kind in KINDS]
    wide = {name: random_weight(8, 24) for name in rng.choice(names, 350, replace=False)}
    error(
        *("rtn", model("m.safetensors", 100, **wide), "-g", 24),
        *("--format", "compressed-tensors", "-o", "out"),
        words=["cannot hold 350 of 700 layers: group_size 24 does not", " more"],
        hint="--group-size -1, or --on-misfit keep, which leaves such layers dense",
    )


@pytest.mark.parametrize(
    ("first", "target", "reason", "hint"),
    [
        ("ptq", "awq", "awq holds 4 bits, not 3", "--bits 4 when the float model is quantized"),
        (
            "ptq",
            "gptq_v2",
            "its scales are float32, some of which float16 cannot hold exactly",
            "--scale-dtype float16 when the float model is quantized",
        ),
    ],
)
def test_repacking_what_does_not_fit(first, target, reason, hint):
    rng = np.random.default_rng(0)
    square = {
        f"model.layers.{i}.{kind}.weight": rng.standard_normal((32, 32)).astype(np.float32)
        for i in range(10)
        for kind in KINDS
    }
    options = ("--bits", 3, "-g", 32, "--asym", "--format", first, "--scale-dtype", "float32")
    assert ptq("rtn", model("m.safetensors", 0, **square), *options, "-o", "own").code == 0
    error(
        *("pack", "own", "--format", target, "-o", "out"),
        words=[f"70 layers: {reason}: {ALL.replace('99', '9')}"],
        hint=hint,
    )


@pytest.mark.parametrize(
    ("command", "what", "hint"),
    [
        (
            "gptq",
            "layers",
            "calibrate them, leave them out with --ignore, or allow --fallback rtn",
        ),
        (
            "calibrate",
            "linears",
            "capture them too, or go on without them with --fallback rtn",
        ),
    ],
)
def test_missing_activations(command, what, hint):
    path, acts = model("m.safetensors", 100), activations("acts", range(3))
    error(
        *(command, path, "--activations", acts, "-o", "out.safetensors"),
        words=[f"for 679 {what}: {MISSING}"],
        hint=hint,
    )
    outcome = ptq(command, path, "--activations", acts, "--fallback", "rtn", "-o", "o.safetensors")
    assert outcome.code == 0
    assert any(MISSING in warning for warning in outcome.warnings)
    assert max(map(len, outcome.warnings)) < 300


def test_activations_of_another_width():
    path, acts = model("m.safetensors", 100), activations("acts", range(100), width=13)
    error(
        *("gptq", path, "--activations", acts, "-o", "out"),
        words=["has in_features 13, but tensor 'model.layers.0.", "699 more are wrong: model."],
        hint=None,
    )


def test_weights_that_are_not_finite():
    bad = {f"model.layers.{i}.mlp.up_proj.weight": np.full((8, 12), np.nan) for i in range(30)}
    bad = {name: values.astype(np.float32) for name, values in bad.items()}
    error(
        *("rtn", model("m.safetensors", 30, **bad), "-g", -1, "-q", "--workers", 1, "-o", "out"),
        words=["NaN", "; 29 more failed: model.layers.{1-29}.mlp."],
        hint="mend the checkpoint, or (without --tokens) leave the tensor out with --ignore",
    )


def test_missing_statistics():
    few = model("few.safetensors", 3)
    acts = activations("acts", range(3))
    assert ptq("calibrate", few, "--activations", acts, "-o", "c.safetensors").code == 0
    outcome = ptq("gptq", model("m.safetensors", 100), "--calibration", "c.safetensors", "-o", "x")
    assert outcome.code == 1
    assert len(outcome.err) < 700
    assert outcome.err.splitlines()[-1].startswith("ptq: hint: ")


def test_layers_are_ordered_by_number():
    path = model("m.safetensors", 12)
    assert ptq("rtn", path, "-g", -1, "-o", "out", "--report", "r.json").code == 0
    blocks = {name: rows_of(name, path) for name in ("report", "dry run", "inspect", "quantized")}
    assert blocks == {name: [str(i) for i in range(12)] for name in blocks}
    weights = Path("out/model.safetensors").read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    stored = dict.fromkeys(name.split(".")[2] for name in header if name != "__metadata__")
    assert list(stored) == sorted(stored)  # as in the model's file: by letter


def rows_of(name: str, path: str) -> list[str]:
    """The numbers of the blocks in the order of a list of layers."""
    if name == "report":
        modules = [row["module"] for row in json.loads(Path("r.json").read_text())["layers"]]
    elif name == "dry run":
        document = ptq("rtn", path, "-g", -1, "--dry-run", "--json", "-o", "x").document
        modules = [layer for unit in document["units"] for layer in unit["layers"]]
    elif name == "inspect":
        modules = [entry["tensor"] for entry in ptq("inspect", path, "--json").document["tensors"]]
    else:
        modules = [row["module"] for row in ptq("inspect", "out", "--json").document["layers"]]
    return list(dict.fromkeys(module.split(".")[2] for module in modules))


@pytest.mark.parametrize(
    ("harmful", "words"),
    [
        ([r"(model\.)?(a+)+$"], ["(a+)+", "could take hours: it repeats what repeats"]),
        (["((?=m){60000}){60000}Z"], ["could take hours: it has too many repeats"]),
        ([f".*{i}.*.*Z" for i in range(2000)], ["2000 regular expressions could take hours"]),
        ([f".*{i}" for i in range(20_000)], ["20000 regular expressions, more than 10000"]),
    ],
)
@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_patterns_of_an_untrusted_config_cannot_hang(form, harmful, words):
    name = "model." + "a" * 100 + ".b"
    path = write_model(Path("m.safetensors"), {f"{name}.weight": random_weight(32, 32)})
    options = ["--asym"] if form == "awq" else []
    command = ("rtn", path, "-g", 32, "--format", form, "-o", "out", *options)
    assert ptq(*command).code == 0
    config = json.loads(Path("out/config.json").read_text())
    own = config["quantization_config"]
    if form == "gptq":
        own["dynamic"] = {f"+:{pattern}": {"bits": 4} for pattern in harmful}
    elif form == "awq":
        own["modules_to_not_convert"] = harmful
    else:
        own["ignore"] = [f"re:{pattern}" for pattern in harmful]
    Path("out/config.json").write_text(json.dumps(config))
    Path("out/quantize_config.json").unlink(missing_ok=True)
    begin = time.perf_counter()
    error("inspect", "out", words=["out/model.safetensors: ", *words], hint=None)
    assert time.perf_counter() - begin < 3


def test_an_error_with_a_hint_is_two_lines_for_python_too():
    assert str(InputError("what is wrong")) == "what is wrong"
    assert str(InputError("what is wrong", hint="--sym")) == "what is wrong\n--sym"


@pytest.mark.parametrize(
    ("own", "hint"),
    [
        (None, "allow --fallback rtn"),
        ("--damp-percent 0.2", "--damp-percent 0.2 or allow --fallback rtn"),
    ],
)
def test_the_way_out_of_a_failed_factorization(job, monkeypatch, own, hint):
    def fail(*_):
        raise NumericalError("no factorization", hint=own)

    monkeypatch.setattr("ptq_cli.run.unit_job.quantize_unit", lambda *_, **__: fail())
    error(
        *("gptq", job, "--activations", "acts", "--workers", 1, "-o", "out"),
        code=4,
        words=["no factorization"],
        hint=hint,
    )


def test_a_fact_ends_with_what_helps():
    modules = tuple(f"model.layers.{i}.mlp.up_proj" for i in range(100))
    fact = Fact("fails", "is asymmetric", modules, "--sym")
    assert str(fact) == "model.layers.{0-99}.mlp.up_proj: is asymmetric; --sym"
