"""A budget instead of a width: `ptq allocate`, and the same options on gptq, rtn and awq."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ptq_cli.commands import allocate
from ptq_cli.errors import FileError
from ptq_cli.run import measure_choices
from ptq_cli.run.quantize_unit import quantize_unit
from ptq_cli.storage.choices import ChoiceTable
from ptq_cli.storage.folder import open_quantized
from ptq_cli.storage.gguf_file import read_gguf_header
from tests.builders import ptq, tree
from tests.cli.tiny_folders import mixtral
from tests.refusals import refused
from tests.run.test_in_sequence import moe_folder
from tests.run.tiny_families import tiny_model
from tests.run.tiny_llama import tiny_llama
from tests.stopping import killed

BLOCKS = ("model.layers.0.", "model.layers.1.")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CHOICES = {
    "ptq": ("--choices", "W2A16,W3A16,W4A16,W6A16", "-g", 16),
    "compressed-tensors": ("--choices", "W3A16,W4A16,W8A16", "-g", 32),
    "mlx": ("--choices", "W2A16,W3A16,W4A16,W6A16", "-g", 32),
    "gptq": ("--choices", "W2A16,W4A16,W8A16", "-g", 16),
    "gguf": ("--choices", "Q4_0,Q5_0,Q8_0"),
}
RECIPE = ("--target-bpw", 4.6, "-g", 16, "-o", "r.toml")
QUICK = ("--method", "rtn", "--choices", "W2A16,W4A16,W6A16")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Llama of two blocks with its tokens, not to be changed."""
    return tiny_llama(tmp_path_factory.mktemp("allocate") / "m", 64)


@pytest.fixture
def model(llama, tmp_path) -> Path:
    """A copy of it in the test's own folder."""
    return shutil.copytree(llama, tmp_path / "m")


@pytest.fixture(scope="session")
def measured(llama, tmp_path_factory):
    """The table of that model's choices rounded to nearest, by the format it is for: another target
    takes a moment."""
    tables: dict[str, Path] = {}

    def make(fmt: str) -> Path:
        if fmt not in tables:
            path = tmp_path_factory.mktemp("table") / "t.json"
            run = ("--format", fmt, *CHOICES[fmt], "--method", "rtn", "--target-bpw", 5.5)
            output = path.with_suffix(".toml")
            done("allocate", llama, *TOKENS(llama), *run, "--table", path, "-o", output)
            tables[fmt] = path
        return tables[fmt]

    return make


def TOKENS(model: Path) -> tuple[object, ...]:
    return ("--tokens", model / "tokens.npy")


def done(*arguments):
    outcome = ptq(*arguments, "-q") if arguments[0] != "allocate" else ptq(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def recipe_of(path="r.toml"):
    return tomllib.loads(Path(path).read_text())


def bits(folder="out"):
    """Of each layer, by its name."""
    return {name: x.grid.bits for name, x in open_quantized(Path(folder)).layers.items()}


def types(path="out/model.gguf"):
    """Of the matrices of a GGUF file that are quantized."""
    tensors = read_gguf_header(Path(path)).tensors
    return {x.spec.name: x.spec.dtype for x in tensors if not x.spec.dtype.startswith("F")}


def weights_size(output):
    files = [output] if output.is_file() else output.glob("*.safetensors"), output.glob("*.gguf")
    found = [output] if output.is_file() else [path for own in files for path in own]
    return sum(path.stat().st_size for path in found)


# ---- a recipe ----


def test_a_recipe_gives_each_layer_what_was_decided(model):
    told = done("allocate", model, *TOKENS(model), *RECIPE)
    recipe = recipe_of()
    assert recipe["method"] == "gptq"
    assert recipe["group_size"] == 16
    decided = {rule["match"]: rule["bits"] for rule in recipe["layers"]}
    done("gptq", model, *TOKENS(model), "--config", "r.toml", "-o", "out")
    found = bits()
    for name, width in found.items():
        (own,) = {b for match, b in decided.items() if re.search(match, f"{name}.weight")}
        assert own == width
    assert len(set(found.values())) > 1
    report = json.loads(Path("out/report.json").read_text())
    assert report["settings"]["allocation"] == recipe["allocation"]
    said = recipe["allocation"]
    assert report["totals"]["bits_per_weight"] == pytest.approx(said["bits_per_weight"], abs=1e-3)
    assert said["bits_per_weight"] <= 4.6
    assert said["bytes"] == weights_size(Path("out"))
    assert f"{said['predicted_kl']:.3g}" in told.out
    assert "ptq gptq" in told.out


def test_the_command_itself_takes_the_budget_and_comes_to_the_same(model):
    done("allocate", model, *TOKENS(model), *RECIPE, *QUICK)
    done("rtn", model, *TOKENS(model), "--config", "r.toml", "-o", "a")
    own = ("rtn", model, *TOKENS(model), *RECIPE[:4], *QUICK[2:], "-o", "b")
    done(*own)
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    again = done(*own)
    assert "finished already" in again.err


def test_outputs_are_called_by_their_bits(model):
    done("allocate", model, *TOKENS(model), *RECIPE[:4], *QUICK)
    assert Path("m-rtn-4.6bpw.toml").exists()
    done("rtn", model, *TOKENS(model), *RECIPE[:4], *QUICK[2:])
    (made,) = Path().glob("m-rtn-4.*bpw")
    assert made.is_dir()


def test_json_is_all_that_stands_on_stdout(model):
    outcome = done("allocate", model, *TOKENS(model), *RECIPE, "--json")
    document = outcome.document
    assert document["output"] == "r.toml"
    assert set(document["groups"].values()) <= set(document["uniform"])
    costs = [own["cost"] for own in document["uniform"].values()]
    assert costs == sorted(costs, reverse=True)
    assert document["predicted_kl"] < document["uniform"]["W3A16"]["cost"]
    curve = np.array(document["curve"])
    assert (np.diff(curve[:, 0]) > 0).all()
    assert (np.diff(curve[:, 1]) < 0).all()


@pytest.mark.parametrize("method", ["rtn", pytest.param("awq", marks=pytest.mark.slow(2))])
def test_each_method_has_a_recipe(model, method):
    done("allocate", model, *TOKENS(model), *RECIPE, "--method", method)
    assert recipe_of()["method"] == method
    done(method, model, *TOKENS(model), "--config", "r.toml", "-o", "out")
    assert len(set(bits().values())) > 1
    assert recipe_of()["allocation"]["bytes"] == weights_size(Path("out"))


def test_fast_measures_by_rounding_to_nearest(model):
    done("allocate", model, *TOKENS(model), *RECIPE, "--method", "rtn", "--table", "a.json")
    fast = ("--fast", "--drift", "0")  # nothing is made up for, as by rtn
    done("allocate", model, *TOKENS(model), *RECIPE, *fast, "--table", "b.json", "--force")
    (a,), (b,) = (json.loads(Path(f"{x}.json").read_text())["tables"].values() for x in "ab")
    assert a == b
    assert recipe_of()["method"] == "gptq"


def test_without_a_model_that_runs_relative_errors_decide(model):
    outcome = done("allocate", model, *RECIPE, "--method", "rtn")
    assert "the model was not run" in outcome.out
    assert recipe_of()["allocation"]["predicted_rel_err"] > 0
    assert len({rule["bits"] for rule in recipe_of()["layers"]}) > 1


# ---- what is alike ----


def is_alike(found):
    """Whether what runtimes fuse has the same numbers."""
    return all(
        len(
            {
                width
                for name, width in found.items()
                if name.startswith(block) and name.endswith(own)
            }
        )
        == 1
        for block in BLOCKS
        for own in FUSED
    )


@pytest.mark.parametrize("fmt", [fmt for fmt in CHOICES if fmt != "gguf"])
@pytest.mark.parametrize("bpw", [5.2, 6.1])
def test_fused_layers_are_alike(llama, measured, fmt, bpw):
    done("rtn", llama, *TOKENS(llama), "--format", fmt, *CHOICES[fmt], "--target-bpw", bpw,
         "-o", "out", "--table", measured(fmt))  # fmt: skip
    found = bits()
    assert is_alike(found)
    assert len(set(found.values())) > 1


def test_experts_of_a_block_are_alike(tmp_path):
    model = tiny_model(tmp_path / "m", "qwen2_moe")
    done("rtn", model, *TOKENS(model), "--target-bpw", 4.3, "-g", 16, "-o", "out")
    found = bits()
    assert len(set(found.values())) > 1
    for block in BLOCKS:
        assert len({x for name, x in found.items() if f"{block}mlp.experts." in name}) == 1
        shared = {x for name, x in found.items() if f"{block}mlp.shared_expert." in name}
        assert len(shared) <= 2


def test_a_tensor_of_gguf_has_one_type(tmp_path):
    model = mixtral(tmp_path / "m")
    np.save("t.npy", np.random.default_rng(0).integers(0, 96, (8, 16)))
    done("rtn", model, "--tokens", "t.npy", "--target-bpw", 5.6, "-o", "out", *CHOICES["gguf"],
         "--format", "gguf")  # fmt: skip
    found = types()
    assert len(set(found.values())) > 1
    assert {"blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"} <= found.keys()
    report = json.loads(Path("out/report.json").read_text())
    assert len({row["bits"] for row in report["layers"]}) > 1


# ---- what is pinned ----


def test_what_is_kept_is_kept(model):
    keep = ("--keep", "down_proj=W6A16", "--keep", "0.self_attn.[qkv]_proj=W2A16")
    done("allocate", model, *TOKENS(model), *RECIPE, *keep, *QUICK)
    done("rtn", model, *TOKENS(model), "--config", "r.toml", "-o", "out")
    for name, width in bits().items():
        if "down_proj" in name:
            assert width == 6
        if "0.self_attn" in name and "o_proj" not in name:
            assert width == 2


def test_pins_of_a_recipe_stay(model):
    Path("own.toml").write_text("group_size = 16\n[[layers]]\nmatch = '0.*o_proj'\nbits = 8\n")
    own = ("--config", "own.toml", "--target-bpw", 4.6, *QUICK)
    done("allocate", model, *TOKENS(model), *own, "-o", "r.toml")
    assert recipe_of()["layers"][-1] == {"match": "0.*o_proj", "bits": 8}
    done("rtn", model, *TOKENS(model), "--config", "r.toml", "-o", "out")
    assert bits()["model.layers.0.self_attn.o_proj"] == 8


def test_ignore_and_include(model):
    more = ("--ignore", "layers.0.mlp", "--include", "lm_head", "--include", "embed_tokens")
    done("rtn", model, *TOKENS(model), *RECIPE[:4], *more, "-o", "out")
    found = bits()
    assert {"lm_head", "model.embed_tokens"} <= found.keys()
    assert not any("layers.0.mlp" in name for name in found)
    done("rtn", model, *TOKENS(model), *RECIPE[:4], *more, "-o", "kept", "--keep", "lm_head=W8A16")
    assert bits("kept")["lm_head"] == 8


def test_pins_of_gguf(model):
    keep = ("--keep", "token_embd=Q8_0", "--keep", "^output=Q5_0", "--keep", "down=Q4_0")
    done("rtn", model, *TOKENS(model), "--target-bpw", 6.2, *CHOICES["gguf"], "-o", "x.gguf",
         "--format", "gguf", *keep)  # fmt: skip
    found = types("x.gguf")
    assert found["token_embd.weight"] == "Q8_0"
    assert found["output.weight"] == "Q5_0"
    assert {kind for name, kind in found.items() if "ffn_down" in name} == {"Q4_0"}


# ---- sizes ----


@pytest.mark.parametrize("fmt", [*CHOICES, "x.gguf"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.8])
def test_an_output_is_never_above_its_target(llama, measured, fmt, part):
    kind, output = ("gguf", Path("x.gguf")) if fmt == "x.gguf" else (fmt, Path("out"))
    common = (*TOKENS(llama), "--format", kind, *CHOICES[kind], "--table", measured(kind))
    look = ("--target-bpw", 6, "--method", "rtn", "--dry-run", "--json")
    looked = ptq("allocate", llama, *common, *look).document
    low, *_, high = (own["bytes"] for own in looked["choices"].values())
    low, high = (low + 6000, high + 4000) if fmt == "x.gguf" else (low, high)  # with the job
    target = int(low + part * (high - low))
    done("rtn", llama, *common, "--target-size", target, "-o", output)
    assert target * 0.93 < weights_size(output) <= target


@pytest.mark.parametrize("fmt", ["ptq", "gguf"])
def test_headers_of_several_files_count(llama, measured, fmt):
    common = (*TOKENS(llama), "--format", fmt, *CHOICES[fmt], "--table", measured(fmt))
    target = {"ptq": 31000, "gguf": 21500}[fmt]
    done("rtn", llama, *common, "--target-size", target, "-o", "whole")
    done("rtn", llama, *common, "--target-size", target, "-o", "out", "--max-shard-size", "8KB")
    found = [path for path in Path("out").iterdir() if path.suffix in (".safetensors", ".gguf")]
    assert len(found) > 1
    assert target * 0.93 < weights_size(Path("out")) <= target
    assert target * 0.93 < weights_size(Path("whole")) <= target


@pytest.mark.slow(2)
@pytest.mark.parametrize("fmt", ["ptq", "compressed-tensors", "mlx", "gguf", "x.gguf"])
def test_an_output_comes_within_half_a_percent_of_its_target(whole_sample, fmt):
    kind, output = ("gguf", Path("x.gguf")) if fmt == "x.gguf" else (fmt, Path("out"))
    choices = CHOICES["gguf"] if kind == "gguf" else ("--choices", "W3A16,W4A16,W6A16,W8A16")
    choices = (*choices, "-g", 64) if kind == "mlx" else choices
    common = ("--format", kind, *choices, "--table", "t.json")
    low, *_, high = (
        own["bytes"]
        for own in ptq("allocate", whole_sample, *common, "--target-bpw", 6, "--dry-run", "--json",
                       "--method", "rtn").document["choices"].values()
    )  # fmt: skip
    for part in (0.3, 0.6):
        target = int(low + part * (high - low))
        done("rtn", whole_sample, *common, "--target-size", target, "-o", output, "--force")
        assert target * 0.995 <= weights_size(output) <= target


# ---- what is measured is kept ----

SAVED = "ptq_cli.storage.choices:ChoiceTable.save"


WAVES = ("--max-memory", "1KB")  # trials are taken to the end block by block


def table(path="m.choices.json"):
    """The one set of measurements in a table."""
    (own,) = json.loads(Path(path).read_text())["tables"].values()
    return own


@pytest.mark.slow(2)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(model, monkeypatch):
    run = ("allocate", model, *TOKENS(model), *RECIPE[:4], "--include", "lm_head", *QUICK)
    done(*run, "-o", "whole.toml", "--table", "whole.json")
    killed(SAVED, 2, *run, *WAVES, "-o", "r.toml")
    assert not Path("r.toml").exists()
    first = {name for name in table("whole.json")["errors"] if ".0." in name}
    assert table()["errors"].keys() == first
    rounded = []
    monkeypatch.setattr(measure_choices, "quantize_unit", noting(rounded, quantize_unit))
    done(*run, "-o", "r.toml")
    assert rounded
    assert not first.intersection(rounded)
    assert Path("r.toml").read_bytes() == Path("whole.toml").read_bytes()
    assert table() == table("whole.json")


def test_an_error_on_the_way_loses_no_wave(model, monkeypatch):
    run = ("allocate", model, *TOKENS(model), *RECIPE, *QUICK, *WAVES)
    save, calls = ChoiceTable.save, []

    def full(self):
        calls.append(self)
        if len(calls) == 2:
            raise FileError("no space left")
        save(self)

    monkeypatch.setattr(ChoiceTable, "save", full)
    assert ptq(*run).errors == ["ptq: error: no space left"]
    assert len(table()["errors"]) == 7
    done(*run)
    assert len(table()["errors"]) == 14


def noting(found, function):
    """Note which layers are rounded."""

    def called(unit, *arguments):
        found.extend(layer.module for layer in unit.layers)
        return function(unit, *arguments)

    return called


def test_what_is_measured_is_saved_in_waves_however_much_memory_there_is(model, monkeypatch):
    run = ("allocate", model, *TOKENS(model), *RECIPE[:4], *QUICK)
    done(*run, "-o", "whole.toml", "--table", "whole.json")
    monkeypatch.setattr(measure_choices, "WAVE", 8)
    save, tried = ChoiceTable.save, []

    def noted(self):
        tried.append(len(self.divergences))
        save(self)

    monkeypatch.setattr(ChoiceTable, "save", noted)
    done(*run, "-o", "r.toml")
    assert tried == [4, 8, 8]
    assert Path("r.toml").read_bytes() == Path("whole.toml").read_bytes()


@pytest.mark.parametrize("fmt", ["ptq", "gguf"])
def test_the_order_of_the_choices_says_nothing(llama, measured, fmt):
    word, choices, *more = CHOICES[fmt]
    back = ",".join(reversed(choices.split(",")))
    for given, output in (choices, "a.toml"), (back, "b.toml"):
        done("allocate", llama, *TOKENS(llama), "--format", fmt, word, given, *more, "--method",
             "rtn", "--target-bpw", 5.8, "--table", measured(fmt), "-o", output)  # fmt: skip
    assert Path("a.toml").read_bytes() == Path("b.toml").read_bytes()


def test_waves_give_the_numbers_of_one(model):
    run = ("allocate", model, *TOKENS(model), *RECIPE[:4], *QUICK, "--include", "lm_head",
           "--include", "embed")  # fmt: skip
    done(*run, "-o", "a.toml", "--table", "a.json")
    done(*run, "-o", "b.toml", "--table", "b.json", *WAVES)
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert Path("a.toml").read_bytes() == Path("b.toml").read_bytes()


def test_another_target_measures_nothing(model, monkeypatch):
    done("allocate", model, *TOKENS(model), *RECIPE, *QUICK)
    monkeypatch.setattr(measure_choices, "quantize_unit", None)
    monkeypatch.setattr(measure_choices, "Trials", None)
    size = recipe_of()["allocation"]["bytes"]
    for target in (("--target-bpw", 5), ("--target-size", size), ("--target-bpw", 4.6)):
        done(
            "allocate", model, *TOKENS(model), "-g", 16, *target, *QUICK, "-o", "r.toml", "--force"
        )
    fewer = (*QUICK[:3], "W2A16,W4A16")
    done("allocate", model, *TOKENS(model), "-g", 16, "--target-bpw", 4, "-o", "s.toml", *fewer)
    done("rtn", model, *TOKENS(model), "-g", 16, "--target-bpw", 5, *QUICK[2:], "-o", "out")


@pytest.mark.parametrize(
    "other",
    [("--asym",), ("-g", 32), ("--nsamples", 8), ("--trial-tokens", 24), ("--no-mse",),
     ("--format", "compressed-tensors"), ("--keep", "o_proj=W4A16")],
)  # fmt: skip
def test_other_settings_take_no_numbers_of_these(llama, measured, other, monkeypatch):
    kept = shutil.copy(measured("ptq"), "t.json")
    run = ("allocate", llama, *TOKENS(llama), *CHOICES["ptq"], "--target-bpw", 5.5, "--table", kept)
    rounded = []
    monkeypatch.setattr(measure_choices, "quantize_unit", noting(rounded, quantize_unit))
    done(*run, "-o", "a.toml", "--method", "rtn")
    assert rounded == []
    done(*run, *other, "-o", "b.toml", "--method", "rtn")
    assert len(set(rounded)) == 14
    assert len(json.loads(Path(kept).read_text())["tables"]) == 2


def test_another_model_takes_no_numbers_of_this(model):
    done("allocate", model, *TOKENS(model), *RECIPE, *QUICK)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors")
    done("allocate", model, *TOKENS(model), *RECIPE, *QUICK, "--force")
    one, other = json.loads(Path("m.choices.json").read_text())["tables"].values()
    assert one != other


def test_two_runs_at_once_keep_what_both_measure(tmp_path):
    path = tmp_path / "t.json"
    one, other = ChoiceTable(path, {"a": 1}), ChoiceTable(path, {"a": 2})
    same = ChoiceTable(path, {"a": 1})
    one.add_divergence("g", "W2A16", 0.5)
    one.save()
    other.add_divergence("g", "W2A16", 0.75)
    other.save()
    same.add_divergence("g", "W4A16", 0.25)
    same.add_divergence("h", "W4A16", 0.125)
    same.save()
    one.save()
    assert ChoiceTable(path, {"a": 1}).divergences == {
        "g": {"W2A16": 0.5, "W4A16": 0.25}, "h": {"W4A16": 0.125}
    }  # fmt: skip
    assert ChoiceTable(path, {"a": 2}).divergences == {"g": {"W2A16": 0.75}}


def no_space(*paths):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_table_is_whole_or_as_it_was(tmp_path, monkeypatch):
    table = ChoiceTable(tmp_path / "t.json", {})
    table.add_divergence("g", "W2A16", 0.5)
    table.save()
    before = table.path.read_bytes()
    monkeypatch.setattr(os, "replace", no_space)
    table.add_divergence("g", "W4A16", 0.5)
    with pytest.raises(FileError, match="No space left"):
        table.save()
    assert table.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


# ---- bad input ----


def refuse(*arguments, words=(), code=1):
    return refused(*arguments, words=words, code=code).errors[0]


NEVER = {
    "smallest": (("--target-bpw", 1), ("--target-bpw 1", "smallest", "3.500")),
    "largest": (("--target-bpw", 99), ("--target-bpw 99", "largest", "7.500", "larger --choices")),
    "small size": (("--target-size", "1KB"), ("1000 bytes", "smallest", "KiB")),
    "large size": (("--target-size", "1GB"), ("1000000000 bytes", "largest", "KiB")),
    "nan": (("--target-bpw", "nan"), ("nan",)),
    "infinity": (("--target-bpw", "inf"), ("inf",)),
    "no size": (("--target-size", 0), ("not a size",)),
    "negative size": (("--target-size", -5), ("not a size",)),
    "nan size": (("--target-size", "nan"), ("not a size",)),
    "both": (("--target-size", "30KB", "--target-bpw", 4), ("exclude each other",)),
    "one choice": (("--choices", "W4A16"), ("nothing to choose",)),
    "one choice twice": (("--choices", "W4A16", "--choices", "w4a16"), ("nothing to choose",)),
    "no choice": (("--choices", "W9A16,W4A16"), ("W9A16", "W2A16 … W8A16", "NVFP4", "Q4_K")),
    "a mix": (("--choices", "Q4_K_M,Q4_K_S"), ("no choice 'Q4_K_M'",)),
    "types and widths": (("--choices", "Q4_0,W4A16"), ("Q4_0,W4A16", "one file")),
    "types to keep": (("--keep", "q_proj=Q4_0"), ("--keep q_proj=Q4_0", "one file")),
    "huge size": (("--target-size", f"{10**400}GB"), ("not a size",)),
    "keeps what is dense": (("--keep", "lm_head=W6A16"), ("--keep lm_head=W6A16", "stays as it")),
    "keeps all": (("--keep", ".=W4A16"), ("nothing to share out", "--keep")),
    "nothing to keep": (("--keep", "q_proj"), ("not REGEX=CHOICE",)),
    "no pattern": (("--keep", "(=W4A16"), ("not a regular expression",)),
    "keeps nothing": (("--keep", "nosuch=W4A16"), ("nosuch", "matches no tensor")),
    "fused": (("--keep", "q_proj=W4A16"), ("0.self_attn.q_proj", "k_proj", "one matrix")),
    "format": (("--format", "awq"), ("--choices W2A16", "awq holds 4 bits, not 2", "down")),
    "group": (("--format", "mlx"), ("mlx has groups of 32, 64, 128, not 16", "layers.{0-1}")),
    "folder": (("-o", "nowhere/r.toml"), ("nowhere", "no such folder")),
    "table": (("--table", "nowhere/t.json"), ("nowhere", "no such folder")),
    "table is a folder": (("--table", "m"), ("m", "not a regular file")),
    "suffix": (("-o", "r.txt"), ("r.txt", ".toml")),
    "strict": (("--strict", "--nsamples", 2), ("(--strict)",)),
    "no tensor": (("--ignore", "_proj"), ("",)),
    "idle setting": (("--method", "awq", "--sweeps", 3), ("sweeps", "--then gptq")),
}  # fmt: skip


@pytest.mark.parametrize("case", NEVER)
def test_a_mistake_is_a_line_before_anything_is_measured(model, case, monkeypatch):
    monkeypatch.setattr(allocate, "measure_choices", None)
    options, words = NEVER[case]
    target = () if any("--target" in str(word) for word in options) else ("--target-bpw", 4.6)
    output = () if "-o" in options else ("-o", "r.toml")
    refuse("allocate", model, *TOKENS(model), "-g", 16, *target, *options, *output, words=words)


def test_a_recipe_that_says_all_leaves_nothing_to_share_out(model):
    done("allocate", model, *TOKENS(model), *RECIPE, *QUICK)
    again = ("--config", "r.toml", "--target-bpw", 5, *QUICK, "-o", "s.toml")
    refuse("allocate", model, *TOKENS(model), *again, words=("nothing to share out", "[[layers]]"))


@pytest.mark.parametrize("kind", ["folder", "file", "output"])
def test_an_output_that_is_there_is_refused_before_anything_is_measured(model, kind, monkeypatch):
    output = Path("x.gguf" if kind == "file" else "out")
    run = ("rtn", model, *TOKENS(model), "-o", output)
    if kind == "folder":
        (output / "of").mkdir(parents=True)
    elif kind == "file":
        output.write_text("mine")
    else:
        done(*run, "-g", 16)
    choices = CHOICES["gguf"] if kind == "file" else ("-g", 16)
    form = ("--format", "gguf") if kind == "file" else ()
    monkeypatch.setattr(allocate, "measure_choices", None)
    refuse(*run, *form, *choices, "--target-bpw", 5, words=(f"{output}: exists already",))


def test_a_place_for_the_table_that_cannot_be_written_is_named_first(model, monkeypatch):
    monkeypatch.setattr(allocate, "measure_choices", None)
    Path("kept").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "kept")
    outcome = refused("allocate", model, *TOKENS(model), *RECIPE, "--table", "kept/t.json",
                      words=("kept: not writable",))  # fmt: skip
    assert "choose another place with --table" in outcome.err


@pytest.mark.parametrize(
    ("options", "word"),
    [((), "--target-bpw or --target-size"), (("--target-bpw", 0), "x>0"),
     (("--target-bpw", -3), "x>0"), (("--target-bpw", "four"), "four")],
)  # fmt: skip
def test_no_target_is_a_mistake_of_usage(model, options, word):
    outcome = ptq("allocate", model, *TOKENS(model), *options)
    assert outcome.code == 2
    assert word in outcome.err
    assert not Path("m.choices.json").exists()


@pytest.mark.parametrize(
    "options",
    [("--choices", "W4A16"), ("--keep", "q=W4A16"), ("--fast",), ("--trial-tokens", 3),
     ("--table", "t.json")],
)  # fmt: skip
def test_what_goes_with_a_target_does_nothing_without(model, options):
    words = (options[0], "does nothing without --target-bpw or --target-size")
    refuse("gptq", model, "-g", 16, "-o", "out", *options, words=words)


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--bits", 4), "--bits"), (("--scheme", "W4A16"), "--scheme"),
     (("--format", "gguf", "--tensor-type", "a=Q4_0"), "--tensor-type"),
     (("-o", "nowhere/out"), "no such folder"), (("-o", "x.gguf"), "--format gguf"),
     (("--runtime", "vllm", "--strict"), "")],
)  # fmt: skip
def test_what_does_not_go_with_a_target(model, options, word, monkeypatch):
    monkeypatch.setattr(allocate, "measure_choices", None)
    output = () if "-o" in options else ("-o", "out")
    refuse("gptq", model, *TOKENS(model), "-g", 16, "--target-bpw", 4.6, *output, *options,
           words=(word,))  # fmt: skip


def test_another_recipe_is_not_replaced_unasked(model, monkeypatch):
    run = ("allocate", model, *TOKENS(model), "-g", 16, *QUICK, "-o", "r.toml")
    done(*run, "--target-bpw", 4.6)
    done(*run, "--target-bpw", 4.6)
    refuse(*run, "--target-bpw", 5, words=("r.toml exists already", "--force"))
    monkeypatch.setattr(allocate, "measure_choices", None)
    refuse(*run, "--target-bpw", 5, "--asym", words=("r.toml exists already", "--force"))


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": 1}', '[]', '{"format": "ptq choices 1", "tables": {"a": {"errors": 3}}}',
     '{"format": "ptq choices 1", "tables": {"a": {"errors": {"m": {"W2A16": {"rel_err": -1}}}}}}',
     '{"format": "ptq choices 1", "tables": {"a": {"divergences": {"m": {"W2A16": "x"}}}}}',
     '{"format": "ptq choices 1", "tables": {"a": {"divergences": {"m": {"W2A16": NaN}}}}}',
     '{"format": "ptq choices 2", "tables": {}}', "\udcff", '{"a": ' * 2000],
)  # fmt: skip
def test_a_torn_or_foreign_table(model, text):
    Path("t.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse("allocate", model, *TOKENS(model), *RECIPE, "--table", "t.json", words=("t.json",))


def test_choices_that_a_layer_cannot_have(tmp_path):
    model = tiny_llama(tmp_path / "m", 48)
    run = ("rtn", model, *TOKENS(model), "--target-bpw", 5.2, "-g", 32, "-o", "out")
    choices = ("--format", "gptq", "--choices", "W2A16,W3A16,W8A16")
    words = ("group_size 32 does not divide in_features 48", "down_proj")
    refuse(*run, *choices, words=words)
    done(*run, *choices, "--on-misfit", "keep")
    found = bits()
    assert not any("down_proj" in name for name in found)
    assert is_alike(found)
    for block in BLOCKS:  # gptq holds no 3 bits in 16 rows
        assert found[f"{block}self_attn.k_proj"] != 3


def test_a_model_that_is_quantized_is_measured_against_what_it_decodes_to(model):
    done("rtn", model, "-g", 16, "-o", "q", "--bits", 8)
    outcome = done("allocate", "q", *TOKENS(model), *RECIPE, *QUICK)
    assert "was quantized before" in outcome.err


def test_no_token_to_try_on(model):
    np.save("mask.npy", np.zeros((16, 12), np.uint8))
    refuse("allocate", model, *TOKENS(model), "--mask", "mask.npy", *RECIPE, words=("mask",))
    refuse("awq", model, "--target-bpw", 4.6, "-g", 16, "-o", "out", words=("no calibration",))


def test_an_expert_that_no_token_reaches_takes_what_the_others_take(tmp_path):
    model = moe_folder(tmp_path / "m")
    run = ("--target-bpw", 4.6, "-g", 16, "--choices", "W2A16,W4A16,W8A16", "-o", "out")
    done("rtn", model, *TOKENS(model), *run)
    found = bits()
    for block in BLOCKS:
        assert len({x for name, x in found.items() if f"{block}block_sparse_moe" in name}) == 1
    assert len(set(found.values())) > 1


# ---- a dry run ----


def test_a_dry_run_says_what_is_to_be_measured(model):
    outcome = done("allocate", model, *TOKENS(model), *RECIPE, *QUICK, "--dry-run")
    assert "to measure: 14 layers at 3 choices, 16 trials on 1024 tokens" in outcome.out
    assert "W4A16" in outcome.out
    document = done("allocate", model, *TOKENS(model), *RECIPE, *QUICK, "--dry-run", "--json")
    assert document.document["to_measure"] == 14
    assert document.document["allocation"] is None
    done("rtn", model, *TOKENS(model), *RECIPE[:4], *QUICK[2:], "--dry-run", "-o", "out")
    assert [path.name for path in Path().iterdir()] == ["m"]


def test_a_dry_run_shows_what_would_be_decided(model):
    done("allocate", model, *TOKENS(model), *RECIPE, *QUICK)
    before = tree(Path())
    run = ("--target-bpw", 5, "-g", 16, "--dry-run")
    outcome = done("allocate", model, *TOKENS(model), *run, *QUICK)
    assert "measured already" in outcome.out
    assert "allocated" in outcome.out
    document = done("allocate", model, *TOKENS(model), *run, *QUICK, "--json").document
    assert document["to_measure"] == 0
    assert document["allocation"]["bits_per_weight"] <= 5
    planned = ptq("rtn", model, *TOKENS(model), *run, *QUICK[2:], "-o", "out", "--json").document
    assert {row["bits"] for row in planned["layers"]} > {2}
    assert tree(Path()) == before


def test_a_recipe_needs_room_where_it_goes_and_nowhere_else(model, monkeypatch):
    Path("elsewhere").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path())
    words = ("--target-bpw", 4.6, "-g", 16, "--table", "elsewhere/t.json", "-o")
    done("allocate", model, *TOKENS(model), *words, "elsewhere/r.toml")
    assert recipe_of("elsewhere/r.toml")["layers"]
    refused("allocate", model, *TOKENS(model), *words, "r.toml", words=("not writable",))
