"""Schemes of small floats: what is written, what siblings share, what cannot be."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.storage.quantized import open_quantized
from tests import oracles
from tests.builders import ptq, random_inputs, random_weight, read_model, write_model

SMALL = [name for name, scheme in SCHEMES.items() if scheme.fixed]
WITHOUT_CALIBRATION = [name for name in SMALL if name not in ("FP8", "NVFP4")]
ATTENTION = ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj")


@pytest.fixture
def model(tmp_path) -> Path:
    """q, k, v of unlike size see one input, of 128; o sees its own, of 256, and has 130 outputs."""
    tensors = {f"{name}.weight": random_weight(16, 128, seed=n) for n, name in enumerate(ATTENTION)}
    tensors["layers.0.k_proj.weight"] = tensors["layers.0.k_proj.weight"] * 8
    tensors["layers.0.o_proj.weight"] = random_weight(130, 256, seed=5)
    for name in ATTENTION:
        np.save(_folder(tmp_path) / f"{name}.npy", random_inputs(80, 128))
    np.save(_folder(tmp_path) / "layers.0.o_proj.npy", random_inputs(80, 256))
    return write_model(tmp_path / "model.safetensors", tensors)


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "acts"
    folder.mkdir(exist_ok=True)
    return folder


def quantize(model, scheme, *options, command="rtn"):
    return ptq(command, model, "--scheme", scheme, "-o", "out", "--force", *options)


def decoded(path: Path, module: str, scheme: str) -> np.ndarray:
    """A layer of a native file, from its bytes, by the formula."""
    tensors = read_model(path / "model.safetensors")

    def array(name, kind):
        _, shape, data = tensors[f"{module}.{name}"]
        return np.frombuffer(data, kind).reshape(shape)

    levels = SCHEMES[scheme].grid["levels"]
    packed = array("qweight", np.uint8)
    codes = packed if levels == "e4m3" else np.stack([packed & 15, packed >> 4], -1)
    table = np.array(oracles.LEVELS[levels])
    table = np.concatenate([table, [0] * (levels == "e4m3"), -table, [0] * (levels == "e4m3")])
    values = table[codes].reshape(len(packed), -1)
    words = {"F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    words |= {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
    scales = array("scales", words[tensors[f"{module}.scales"][0]]).astype(np.float64)
    if f"{module}.global_scale" in tensors:
        scales = scales / array("global_scale", np.float32)[0]
    group, rows = SCHEMES[scheme].settings["group_size"], SCHEMES[scheme].grid.get("block_rows", 1)
    if group > 0:
        scales = np.repeat(scales, group, 1)[:, : values.shape[1]]
    return values * (np.repeat(scales, rows, 0)[: len(values)] if rows > 1 else scales)


# ---- what is written ----


@pytest.mark.parametrize("command", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", SMALL)
def test_what_is_stored_is_near_the_weight(model, scheme, command):
    arguments = ("--format", "ptq", "--activations", "acts", "--json")
    outcome = quantize(model, scheme, *arguments, command=command)
    assert outcome.code == 0, outcome.err
    folder, levels = open_quantized(Path("out")), SCHEMES[scheme].grid["levels"]
    for row in outcome.document["layers"]:
        assert row["levels"] == levels
        assert row["gain_vs_rtn"] >= 1
        module = row["module"]
        own, weight = decoded(Path("out"), module, scheme), folder.load(module)
        np.testing.assert_allclose(weight.dequantized(), own, rtol=1e-6)
        kind, shape, data = read_model(model)[f"{module}.weight"]
        assert kind == "BF16"
        original = np.frombuffer(data, ml_dtypes.bfloat16).reshape(shape).astype(np.float64)
        error = np.square(own - original).sum() / np.square(original).sum()
        assert error < (0.003 if levels == "e4m3" else 0.04)


@pytest.mark.parametrize("scheme", WITHOUT_CALIBRATION)
def test_no_calibration_is_needed(model, scheme):
    (Path("acts")).rename("elsewhere")
    assert quantize(model, scheme, "--format", "ptq").code == 0
    assert open_quantized(Path("out")).layers[ATTENTION[0]].activation == SCHEMES[scheme].inputs


@pytest.mark.parametrize(
    ("scheme", "other"), [("FP8", "--scheme FP8_DYNAMIC"), ("NVFP4", "--scheme NVFP4A16")]
)
def test_a_scale_of_inputs_wants_calibration(model, scheme, other):
    (Path("acts")).rename("elsewhere")
    outcome = quantize(model, scheme)
    assert outcome.code == 1
    assert "no statistics to take scales of the inputs from for 4 layers" in outcome.err
    assert other in outcome.err
    assert not Path("out").exists()


def test_the_scale_of_inputs_holds_the_largest(model):
    largest = float(np.abs(np.load("acts/layers.0.o_proj.npy").astype(np.float32)).max())
    assert quantize(model, "FP8", "--format", "ptq", "--activations", "acts").code == 0
    scale = open_quantized(Path("out")).load("layers.0.o_proj").input_scale
    assert 0.9 < scale * 448 / largest <= 1.0001  # it may stand in what was held out
    assert quantize(model, "NVFP4", "--format", "ptq", "--activations", "acts").code == 0
    divisor = open_quantized(Path("out")).load("layers.0.o_proj").input_scale
    assert divisor == pytest.approx(6 / scale, rel=1e-6)


def test_siblings_share_the_global_scale_of_the_largest(model):
    assert quantize(model, "NVFP4A16", "--format", "ptq").code == 0
    folder = open_quantized(Path("out"))
    found = {module: folder.load(module).grid.global_scale for module in folder.layers}
    data = read_model(model)["layers.0.k_proj.weight"][2]
    loudest = np.abs(np.frombuffer(data, ml_dtypes.bfloat16).astype(np.float64)).max()
    assert found["layers.0.k_proj"] == pytest.approx(448 * 6 / loudest, rel=1e-6)
    assert len({found[name] for name in ATTENTION}) == 1
    assert found["layers.0.o_proj"] > found["layers.0.k_proj"]


def test_a_global_scale_may_be_a_power_of_two(model):
    options = ("--format", "ptq", "--global-scale", "power-of-two")
    assert quantize(model, "NVFP4A16").code == 0
    assert quantize(model, "NVFP4A16", "--format", "ptq").code == 0
    plain = open_quantized(Path("out")).load("layers.0.o_proj").grid.global_scale
    assert quantize(model, "NVFP4A16", *options).code == 0
    power = open_quantized(Path("out")).load("layers.0.o_proj").grid.global_scale
    assert np.log2(power) == np.floor(np.log2(plain))


def test_a_shared_global_scale_may_be_one(tmp_path):
    """Weights up to 2000 have the power of two 1, their siblings would have 2^13 by themselves."""
    weights = {f"{name}.weight": random_weight(16, 128, dtype=np.float32) for name in ATTENTION}
    weights["layers.0.k_proj.weight"][0, 0] = 2000
    model = write_model(tmp_path / "m.safetensors", weights)
    options = ("--format", "ptq", "--global-scale", "power-of-two")
    assert quantize(model, "NVFP4A16", *options).code == 0
    folder = open_quantized(Path("out"))
    assert {folder.load(name).grid.global_scale for name in ATTENTION} == {1.0}


def test_the_format_is_the_schemes_unless_another_is_named(model):
    assert ptq("rtn", model, "--scheme", "NVFP4A16").code == 0
    assert open_quantized(Path("model-rtn-nvfp4a16")).fmt.name == "compressed-tensors"
    assert ptq("rtn", model, "--scheme", "NVFP4A16", "--format", "ptq").code == 0
    assert open_quantized(Path("model-rtn-nvfp4a16-ptq")).fmt.name == "ptq"


def test_layers_may_have_schemes_of_their_own(model):
    Path("r.toml").write_text(
        'scheme = "NVFP4A16"\n[[layers]]\nmatch = "o_proj"\nscheme = "FP8_DYNAMIC"\n'
    )
    assert ptq("rtn", model, "--config", "r.toml", "-o", "out", "--format", "ptq").code == 0
    layers = open_quantized(Path("out")).layers
    assert layers["layers.0.q_proj"].grid.levels == "e2m1"
    assert layers["layers.0.q_proj"].activation is None
    assert layers["layers.0.o_proj"].grid.levels == "e4m3"
    assert layers["layers.0.o_proj"].activation == SCHEMES["FP8_DYNAMIC"].inputs


@pytest.mark.parametrize("scheme", SMALL)
def test_eval_measures_it_as_it_runs(model, scheme):
    assert quantize(model, scheme, "--activations", "acts", "--format", "ptq").code == 0
    outcome = ptq("eval", model, "out", "--activations", "acts", "--json")
    assert outcome.code == 0, outcome.err
    assert 0 < outcome.document["totals"]["mean_rel_err"] < 0.1
    for row in outcome.document["layers"]:
        assert row["levels"] == SCHEMES[scheme].grid["levels"]
        rounded = SCHEMES[scheme].inputs is not None
        assert ("weight_rel_err" in row) == rounded
        assert not rounded or row["weight_rel_err"] < row["heldout_rel_err"]


@pytest.mark.parametrize("scheme", SMALL)
def test_it_is_packed_for_runtimes_without_loss(model, scheme):
    options = ("--activations", "acts", "--scale-dtype", "bfloat16")
    options = options if scheme.startswith("FP8") else options[:2]
    assert quantize(model, scheme, *options).code == 0
    assert ptq("pack", "out", "--format", "ptq", "-o", "native").code == 0
    assert ptq("pack", "native", "--format", "compressed-tensors", "-o", "back").code == 0
    assert read_model(Path("back/model.safetensors")) == read_model(Path("out/model.safetensors"))


@pytest.mark.parametrize(
    ("before", "after"), [("MXFP4A16", "NVFP4A16"), ("MXFP4", "NVFP4A16"), ("NVFP4", "NVFP4A16")]
)
@pytest.mark.parametrize("name", ["ptq", "compressed-tensors"])
def test_levels_are_packed_in_another_scheme_without_loss(model, before, after, name):
    assert quantize(model, before, "--activations", "acts").code == 0
    outcome = ptq("pack", "out", "--scheme", after, "--format", name, "-o", "other")
    assert outcome.code == 0, outcome.err
    first, second = open_quantized(Path("out")), open_quantized(Path("other"))
    for module, layer in second.layers.items():
        assert (layer.grid.group_size, layer.activation) == (16, None)
        np.testing.assert_array_equal(
            first.load(module).dequantized(), second.load(module).dequantized()
        )


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("FP8_DYNAMIC", "its codes are FP4 numbers (E2M1), which FP8_DYNAMIC does not have"),
        ("MXFP4A16", "some of which float8_e8m0fnu cannot hold exactly"),
    ],
)
def test_no_other_scheme_without_loss(model, scheme, words):
    assert quantize(model, "NVFP4A16").code == 0
    outcome = ptq("pack", "out", "--scheme", scheme, "-o", "other")
    assert outcome.code == 1
    assert words in outcome.err
    assert "round it anew: ptq rtn" in outcome.err
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("NVFP4A16", "--bits", 3), "NVFP4A16 has bits 4, not 3"),
        (("FP8_BLOCK", "--group-size", 64), "FP8_BLOCK has group-size 128, not 64"),
        (("FP8_DYNAMIC", "--asym"), "FP8_DYNAMIC has sym on, not off"),
        (("MXFP4A16", "--scale-dtype", "float16"), "MXFP4A16 has scales of its own, not float16"),
        (("FP8_DYNAMIC", "--global-scale", "power-of-two"), "--global-scale power-of-two does"),
        (("MXFP4A16", "--format", "gptq"), "gptq"),
    ],
)
def test_what_a_scheme_does_not_have_is_refused(model, options, words):
    outcome = quantize(model, *options)
    assert outcome.code == 1
    assert words in outcome.err
    assert not Path("out").exists()


def test_smoothquant_takes_how_inputs_are_rounded_from_the_scheme(model):
    Path("r.toml").write_text('[[sites]]\nlinears = ["layers.0.o_proj"]\n')
    options = ("--activations", "acts", "--config", "r.toml", "--format", "ptq")
    options = ("FP8_DYNAMIC", *options)
    outcome = quantize(model, *options, "--activation-bits", 4, command="smoothquant")
    assert (outcome.code, "so does --activation-bits" in outcome.err) == (1, True)
    outcome = quantize(model, *options, command="smoothquant")
    assert outcome.code == 0, outcome.err
    layer = open_quantized(Path("out")).layers["layers.0.o_proj"]
    assert layer.activation == SCHEMES["FP8_DYNAMIC"].inputs


@pytest.mark.parametrize("scheme", SMALL)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(model, scheme, value, tmp_path):
    weight = random_weight(16, 128)
    weight[3, 5] = value
    bad = write_model(tmp_path / "bad.safetensors", {f"{ATTENTION[0]}.weight": weight})
    outcome = quantize(bad, scheme, "--activations", f"acts/{ATTENTION[0]}.npy")
    assert outcome.code == 1
    assert "NaN or inf at index [3, 5], 1 in all" in outcome.err
    assert not Path("out").exists()


def test_integer_inputs_have_no_product_with_small_floats(model):
    assert quantize(model, "NVFP4A16", "--activations", "acts").code == 0
    options = ("--activations", "acts", "--activation-scheme", "dynamic-token")
    outcome = ptq("eval", model, "out", *options)
    assert outcome.code == 1
    assert "the codes of 4 layers are small floats" in outcome.err


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_smoothquant_leaves_inputs_alone_where_the_scheme_does(model, scheme):
    Path("r.toml").write_text('[[sites]]\nlinears = ["layers.0.o_proj"]\n')
    options = ("--activations", "acts", "--config", "r.toml")
    assert quantize(model, scheme, *options, command="smoothquant").code == 0
    layers = open_quantized(Path("out")).layers.values()
    assert {layer.activation for layer in layers} == {None}


@pytest.mark.parametrize(("factor", "code"), [(1, 0), (1e-3, 1), (1e6, 1), (0, 0)])
def test_mlx_has_no_global_scale_to_help_out(tmp_path, factor, code):
    weight = {"layers.0.q_proj.weight": random_weight(16, 128, dtype=np.float32) * 8 * factor}
    model = write_model(tmp_path / "m.safetensors", weight)
    outcome = quantize(model, "NVFP4A16", "--format", "mlx")
    assert outcome.code == code, outcome.err
    assert not code or "does not fit E4M3 without a global scale" in outcome.err
    assert quantize(model, "NVFP4A16").code == 0


def test_mlx_holds_no_global_scale(model):
    options = ("--format", "mlx", "--global-scale", "power-of-two")
    outcome = quantize(model, "NVFP4A16", *options)
    assert (outcome.code, "mlx holds no global scale" in outcome.err) == (1, True)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_a_packed_tensor_that_lost_its_scales_is_named(model, scheme):
    assert quantize(model, scheme, "--format", "mlx").code == 0
    path = next(Path("out").glob("*.safetensors"))
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["layers.0.o_proj.scales"]
    save_file(tensors, path)
    outcome = ptq("dequantize", "out", "-o", "floats")
    assert outcome.code == 1
    assert "'layers.0.o_proj.weight' is packed, but has no scales beside it" in outcome.err


def test_inputs_that_are_all_zero(model):
    for path in Path("acts").glob("*.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    for scheme in ("FP8", "NVFP4"):
        outcome = quantize(model, scheme, "--activations", "acts")
        assert outcome.code == 0, outcome.err
