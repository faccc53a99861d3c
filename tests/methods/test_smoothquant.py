"""ptq smoothquant on the sample model: what it promises, measured."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import ptq_cli
from ptq_cli.models.sites import Norm
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.folded import read_folds
from ptq_cli.storage.quantized import open_quantized
from tests.builders import half_sample, ptq, read_model, tree, write_model
from tests.cli.conftest import check_report  # noqa: F401
from tests.methods.rescaled import rescaled_sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    return half_sample(tmp_path_factory.mktemp("plain") / "sample_data", blocks=1)


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> Path:
    """The sample with a 64-fold gain in 1 % of every norm's channels."""
    return rescaled_sample(
        tmp_path_factory.mktemp("loud") / "sample_data", copy=partial(half_sample, blocks=1)
    )


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def integer_errors(model, out, scheme):
    """Mean error with integer inputs of the layers that norms feed: as written, plainly rounded."""
    report = ptq_cli.evaluate(model, out, activation_scheme=scheme)
    fed = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    rows = [row.activations for row in report.rows if row.module.endswith(fed)]
    return tuple(
        float(np.mean([getattr(row, part).rel_err for row in rows]))
        for part in ("integer", "plain")
    )


@pytest.mark.parametrize("alpha", ["auto", pytest.param(0.5, marks=pytest.mark.slow)])
def test_loud_channels_cost_a_hundred_times_less_and_hardly_more_than_none(sample, loud, alpha):
    options = {"alpha": alpha, "group_size": 0, "activation_scheme": "dynamic-tensor"}
    ptq_cli.smoothquant(loud, output="out", **options)
    ptq_cli.smoothquant(sample, output="undisturbed", **options)
    smoothed, plain = integer_errors(loud, "out", "dynamic-tensor")
    _, undisturbed = integer_errors(sample, "undisturbed", "dynamic-tensor")
    assert smoothed * 100 < plain
    assert smoothed < 1.5 * undisturbed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_smoothed_float_model_computes_the_same(loud, tmp_path, dtype):
    """float32 to 1e-5; in BF16 the error of rounding the folded weights is reported."""
    folder = shutil.copytree(loud, tmp_path / "model")
    if dtype == "float32":
        read = open_checkpoint(folder)
        tensors = {name: read.read(name).astype(np.float32) for name in read.tensors}
        write_model(folder / "model.safetensors", tensors)
    report = ptq_cli.smoothquant(folder, bits=16, alpha=0.5, output="out")
    folded = [site for site in report.sites if site["fed_by"]]
    assert len(folded) >= 2
    worst = max(site["function_change"] for site in folded)
    assert worst < (1e-5 if dtype == "float32" else 5e-3)
    assert (worst > 1e-4) == (dtype == "bfloat16")
    before, after = (open_checkpoint(path) for path in (folder, Path("out")))
    for site, factors in read_folds(Path("out")):
        if not isinstance(site.feeder, Norm):
            continue
        gain, new = (c.read(site.feeder.weight).astype(np.float64) for c in (before, after))
        np.testing.assert_allclose(new * factors, gain, rtol=1e-6)
        inputs = np.load(folder / "activations" / f"{site.name}.npy").astype(np.float64)
        for linear in site.linears[:1]:  # q_proj, gate_proj: nothing is fed by them
            old, smoothed = (c.read(linear.tensor).astype(np.float64) for c in (before, after))
            outputs, same = inputs @ old.T, (inputs / factors) @ smoothed.T
            change = np.linalg.norm(outputs - same) / np.linalg.norm(outputs)
            assert change < (1e-5 if dtype == "float32" else 5e-3)


def test_a_smoothed_float_model_is_a_model_folder_of_the_same_tensors(sample):
    ptq_cli.smoothquant(sample, bits=16, output="out")
    ours, theirs = (read_model(Path(p) / "model.safetensors") for p in ("out", sample))
    assert {k: v[:2] for k, v in ours.items()} == {k: v[:2] for k, v in theirs.items()}
    assert {"config.json", "tokenizer.json", "report.json", "smooth_scales.st"} <= set(
        tree(Path("out"))
    )


def test_a_smoothed_float_model_that_is_quantized_is_not_folded_twice_by_eval(sample):
    assert ptq("smoothquant", sample, "--bits", 16, "-o", "smoothed").code == 0
    packed = ptq("pack", "smoothed", "-o", "packed", "--json")
    assert packed.code == 0, packed.err
    after = ptq("eval", "smoothed", "packed", "--json")
    assert not [line for line in after.warnings if "differ" in line]
    found, stated = (o.document["totals"]["mean_rel_err"] for o in (after, packed))
    assert found == pytest.approx(stated, rel=1e-6)
    before = ptq("eval", sample, "packed", "--json")  # the model before it was smoothed
    assert before.document["totals"]["worst_rel_err"] < 0.02


def test_a_site_that_is_worse_for_it_is_left_alone_and_said_so(sample, check_report):  # noqa: F811
    outcome = ptq("smoothquant", sample, "--alpha", "auto", "--json", "-o", "out")
    assert outcome.code == 0, outcome.err
    document = check_report(outcome.document)
    left = [site for site in document["sites"] if site["fed_by"] is None]
    kept = [site for site in document["sites"] if site["fed_by"] is not None]
    assert all(site["reason"] for site in left)
    assert kept
    for site in kept:
        assert site["error"] < site["plain_error"]
    rows = {row["module"]: row["method"] for row in document["layers"]}
    assert {rows[m] for site in kept for m in site["linears"]} == {"smoothquant+rtn"}
    assert {rows[m] for site in left for m in site["linears"]} == {"rtn"}


@pytest.fixture(scope="module")
def smoothed(sample, tmp_path_factory) -> Path:
    """What the defaults make of the sample."""
    folder = tmp_path_factory.mktemp("smoothed") / "out"
    ptq_cli.smoothquant(sample, output=folder)
    return folder


def test_int8_weights_per_channel_and_metadata_say_how_inputs_are_rounded(smoothed):
    for layer in open_quantized(smoothed).layers.values():
        assert (layer.grid.bits, layer.grid.group_size, layer.grid.narrow_range) == (8, -1, True)
        assert (layer.activation.bits, layer.activation.dynamic) == (8, True)


def test_static_scales_are_the_smoothed_range(sample):
    ptq_cli.smoothquant(sample, activation_scheme="static", output="out")
    factors = {x.module: f for site, f in read_folds(Path("out")) for x in site.linears}
    folder = open_quantized(Path("out"))
    for module in folder.layers:
        name = module.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        name = name.replace("up_proj", "gate_proj")
        inputs = np.load(sample / "activations" / f"{name}.npy").astype(np.float32)
        token = np.arange(len(inputs))
        heldout = np.flatnonzero(token % 8 == 7)[:512]
        seen = np.delete(inputs, heldout, axis=0) / factors.get(module, np.float32(1))
        scale = folder.checkpoint.read(f"{module}.input_scale")
        np.testing.assert_allclose(scale, [np.abs(seen).max() / 127], rtol=1e-5)


def test_a_loaded_linear_multiplies_integers(sample, smoothed):
    module = "model.layers.0.self_attn.q_proj"
    inputs = np.load(sample / "activations" / f"{module}.npy")[:32].astype(np.float32)
    linear = ptq_cli.load_linear(smoothed, module)
    weight = ptq_cli.load_weight(smoothed, module)
    steps = np.abs(inputs).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(inputs / steps)
    np.testing.assert_allclose(linear(inputs), (codes @ weight.T) * steps, rtol=1e-5, atol=1e-5)


def test_eval_proves_the_folds_and_agrees_with_the_report(loud):
    made = ptq_cli.smoothquant(loud, alpha=0.5, output="out")
    seen = ptq_cli.evaluate(loud, "out")
    assert not [warning for warning in seen.warnings if "differ" in warning]
    for ours, theirs in zip(made.rows, sorted(seen.rows, key=lambda r: r.module), strict=False):
        assert ours.rel_err > 0
        assert theirs.rel_err > 0
    by_module = {row.module: row for row in seen.rows}
    for row in made.rows:
        assert row.heldout_rel_err == pytest.approx(by_module[row.module].heldout_rel_err, rel=1e-5)
        assert row.rtn_rel_err == pytest.approx(by_module[row.module].rtn_rel_err, rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(loud, monkeypatch):
    ptq_cli.smoothquant(loud, output="whole")
    calls = []

    def stop(*progress):
        calls.append(progress)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptq_cli.smoothquant(loud, output="out", listen=stop)
    assert Path("out.partial").exists()
    ptq_cli.smoothquant(loud, output="out")
    assert tree(Path("out")) == tree(Path("whole"))


def test_ignored_layers_of_a_site_are_scaled_too(loud):
    report = ptq_cli.smoothquant(loud, alpha=0.5, ignore=("k_proj",), output="out")
    assert not any("k_proj" in row.module for row in report.rows)
    before, after = open_checkpoint(loud), open_checkpoint(Path("out"))
    for site, factors in read_folds(Path("out")):
        for linear in site.linears:
            if "k_proj" in linear.module:
                weight = before.read(linear.tensor)
                expected = (weight.astype(np.float32) * factors).astype(weight.dtype)
                np.testing.assert_array_equal(after.read(linear.tensor), expected)


def test_a_recipe_names_sites_and_a_family(sample, tmp_path):
    Path("r.toml").write_text('family = "qwen3"\n')
    refused = ptq("smoothquant", sample, "--config", "r.toml")
    assert refused.code == 1
    assert "config.json says the model is a llama" in refused.err
    Path("r.toml").write_text('[[sites]]\nlinears = ["model.layers.*.mlp.nothing"]\n')
    refused = ptq("smoothquant", sample, "--config", "r.toml")
    assert refused.code == 1
    assert "no such module" in refused.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alpha", "1.5"], ("alpha", "1.5", "1.0")),
        (["--alpha", "-0.1"], ("alpha", "-0.1")),
        (["--alpha", "much"], ("alpha", "much", "auto")),
        (["--alpha", "nan"], ("alpha", "nan")),
    ],
)
def test_alpha_out_of_range_is_one_line_and_nothing_is_written(sample, options, words):
    outcome = ptq("smoothquant", sample, *options)
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert all(word in outcome.err for word in words)
    assert tree(Path()) == {}


@pytest.mark.parametrize("percentile", ["0", "1.5", "-1", "nan"])
def test_a_percentile_out_of_range(sample, percentile):
    ptq_cli.pack(sample, bits=8, group_size=-1, output="out")
    scheme = ("--activation-scheme", "dynamic-token", "--percentile", percentile)
    outcome = ptq("eval", sample, "out", *scheme)
    assert outcome.code == 1
    assert "percentile" in outcome.err
    assert percentile in outcome.err


def test_a_site_whose_norm_is_missing(sample, tmp_path):
    folder = shutil.copytree(sample, tmp_path / "model")
    read = open_checkpoint(folder)
    gone = "model.layers.0.input_layernorm.weight"
    tensors = {name: read.read(name) for name in read.tensors if name != gone}
    write_model(folder / "model.safetensors", tensors)
    outcome = ptq("smoothquant", folder, "-o", "out")
    assert outcome.code == 1
    assert gone in outcome.err
    assert not Path("out").exists()


def test_without_calibration_there_is_nothing_to_smooth_with(sample, tmp_path):
    folder = shutil.copytree(sample, tmp_path / "model")
    shutil.rmtree(folder / "activations")
    outcome = ptq("smoothquant", folder)
    assert outcome.code == 1
    assert "no calibration found" in outcome.err


def test_asymmetric_weights_have_no_narrow_range(sample):
    """The default gives way; what was asked for does not."""
    assert ptq("smoothquant", sample, "--asym", "-o", "out").code == 0
    assert ptq("smoothquant", sample, "--asym", "--no-narrow-range", "-o", "same").code == 0
    read = [Path(name, "model.safetensors").read_bytes() for name in ("out", "same")]
    assert read[0] == read[1]
    outcome = ptq("smoothquant", sample, "--asym", "--narrow-range", "-o", "none")
    assert outcome.code == 1
    assert "hint: --no-narrow-range" in outcome.err


@pytest.mark.parametrize("sym", ["", "--sym"])
def test_symmetric_weights_keep_theirs(sym, sample):
    Path("recipe.toml").write_text(f"sym = {'false' if sym else 'true'}\n")
    words = ["--config", "recipe.toml", *sym.split()]
    outcome = ptq("smoothquant", sample, *words, "-o", "out", "--json")
    assert json.loads(outcome.out)["settings"]["narrow_range"] is True


@pytest.mark.parametrize("command", ["awq", "smoothquant"])
def test_a_model_of_no_known_family_names_its_sites(command, sample, tmp_path):
    folder = shutil.copytree(sample, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for kind, words in [
        ("mixtral", "no block of the checkpoint has the linears of a mixtral model"),
        ("nonsense", "model_type 'nonsense' is not known"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        outcome = ptq(command, folder, "-o", "out")
        assert outcome.code == 1
        assert words in outcome.errors[0]
        assert "[[sites]]" in outcome.err


def test_a_format_that_cannot_hold_rounded_inputs(sample):
    outcome = ptq("smoothquant", sample, "--format", "gptq", "-o", "out")
    assert outcome.code == 1
    assert "7 of 7 layers: gptq does not round inputs" in outcome.err


def test_float_weights_in_a_quantized_format_are_refused(sample):
    outcome = ptq("smoothquant", sample, "--bits", 16, "--format", "gptq", "-o", "out")
    assert outcome.code == 1
    assert "format gptq" in outcome.errors[0]
    assert not Path("out").exists()


@pytest.mark.parametrize("option", [["--percentile", "0.5"], ["--activation-bits", "4"]])
def test_how_inputs_are_rounded_needs_a_scheme(option, sample):
    assert ptq("pack", sample, "-o", "out").code == 0
    outcome = ptq("eval", sample, "out", *option)
    assert outcome.code == 2
    assert "--activation-scheme" in outcome.err


@pytest.mark.parametrize("option", [["--nsamples", "3"], ["--seq-len", "8"], ["--parallel-layers"]])
def test_which_tokens_needs_tokens(option, sample):
    outcome = ptq("gptq", sample, *option, "-o", "out")
    assert outcome.code == 1
    assert f"{option[0]} needs --tokens, --text or --chat" in outcome.err
    assert not Path("out").exists()


def test_the_help_of_pack_tells_its_own_default():
    assert "[default: no-mse]" in " ".join(ptq("pack", "--help").out.split())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
def test_shards_and_what_a_runtime_could_not_load(sample, bits):
    small = ("--max-shard-size", "500KB", "--alpha", 0.5)
    runtime = ("--runtime", "vllm") if bits == 8 else ()  # floats are checked once quantized
    outcome = ptq("smoothquant", sample, "--bits", bits, *small, *runtime, "-o", "out")
    assert outcome.code == 0
    assert ("vllm: " in outcome.err) == (bits == 8)
    shards = list(Path("out").glob("model-*.safetensors"))
    assert len(shards) > 1
    ptq("smoothquant", sample, "--bits", bits, "--alpha", 0.5, "-o", "whole")
    split = {name: entry for shard in shards for name, entry in read_model(shard).items()}
    assert split == read_model(Path("whole/model.safetensors"))
