"""`ptq_cli.capture` of torch models, against `ptq calibrate --tokens` and against what plain hooks
see."""

from __future__ import annotations

import json
import shutil
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptq_cli
from ptq_cli.calibration.from_file import CalibrationFile, open_calibration
from ptq_cli.commands import api
from ptq_cli.errors import InputError
from ptq_cli.models.recipe import recipe_sites
from ptq_cli.storage.sources import open_float
from ptq_cli.storage.tokens import TokenSettings
from tests.builders import SAMPLE, write_model
from tests.interop.tiny_models import write_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
OUT = "out.safetensors"
FUSED = ["deepseek_v3", "gpt_oss", "llama4_text", "mixtral_stacked", "qwen3_moe_stacked"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    names = ["bart", "t5", "mixtral", "qwen3_moe", "qwen2_5_vl", "gemma3", "llava"]
    write_models(folder, [*names, *FUSED])
    return folder


def load(folder: Path) -> Any:
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def statistics(path: str = OUT) -> CalibrationFile:
    return open_calibration(Path(path))


def plain_hooks(model: Any, names: dict[str, str]) -> dict[str, list[Any]]:
    """All inputs of some modules, by the checkpoint's names."""
    seen: dict[str, list[Any]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, named: seen.setdefault(name, []).append(
            (*args, *named.values())[0].reshape(-1, module.in_features).clone()
        )

    for inside, stored in names.items():
        model.get_submodule(inside).register_forward_pre_hook(keep(stored), with_kwargs=True)
    return seen


def check(found: CalibrationFile, seen: dict[str, list[Any]]) -> None:
    """Every linear has the statistics of its own inputs."""
    site_of = {linear: site for site, info in found.sites.items() for linear in info.linears}
    for linear, parts in seen.items():
        rows = torch.cat(parts).numpy()
        site = found.load(site_of[linear])
        assert site.n_seen == len(rows)
        kept = np.delete(rows, range(7, len(rows), 8), 0)
        np.testing.assert_allclose(site.hessian, kept.T @ kept / len(kept), rtol=1e-4, atol=1e-5)


def ids(count: int = 4, length: int = 24) -> Any:
    return torch.randint(3, 240, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["sample", "mixtral", "qwen3_moe"])
def test_capture_equals_calibrate_with_tokens(name: str, folder: Path) -> None:
    """Of all tokens: held out are tokens here and, where sequences are known, sequences there."""
    source = SAMPLE if name == "sample" else folder / name
    model = load(source)
    tokens = ids(12, 64)
    np.save("ids.npy", tokens.numpy())
    with ptq_cli.capture(model, source, "torch.safetensors", heldout_every=0):
        for start in range(0, 12, 5):
            model(tokens[start : start + 5])
    given = TokenSettings(Path("ids.npy"))
    api.calibrate(source, output="ours.safetensors", tokens=given, heldout_every=0)
    theirs, ours = (statistics(f"{name}.safetensors") for name in ("torch", "ours"))
    routers = {site for site in ours.sites if site.endswith(".gate")}  # stay dense
    assert set(theirs.sites) == set(ours.sites) - routers - {"lm_head"}  # has no hook
    assert theirs.model == ours.model
    for site in theirs.sites:
        a, b = theirs.load(site), ours.load(site)
        assert (a.linears, a.n_tokens) == (b.linears, b.n_tokens)
        np.testing.assert_allclose(a.hessian, b.hessian, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(a.sample, b.sample, rtol=1e-3, atol=1e-3)
    report = ptq_cli.gptq(source, calibration="torch.safetensors", output="out", group_size=32)
    assert report.totals["calibrated"]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_cross_attention_has_two_sites(name: str, folder: Path) -> None:
    model = load(folder / name)
    part, (q, k, v) = {
        "bart": ("encoder_attn", ("q_proj", "k_proj", "v_proj")),
        "t5": ("EncDecAttention", ("q", "k", "v")),
    }[name]
    named = dict(model.named_modules())
    crosses = [path for path in named if path.endswith(part)]
    assert len(crosses) == 2
    linears = [path for path in named if path.rpartition(".")[2] in {q, k, v}]
    seen = plain_hooks(model, {path: path for path in linears})
    tokens = ids()
    with ptq_cli.capture(model, folder / name, OUT, sites="sites.toml"):
        for batch in tokens.split(2):
            model(input_ids=batch[:, :20], decoder_input_ids=batch[:, 14:])
    found = statistics()
    (encoded,) = (
        linears for linears in in_recipe(folder / name) if len(linears) == 2 * len(crosses)
    )
    assert set(encoded) == {f"{cross}.{own}" for cross in crosses for own in (k, v)}  # one memory
    shared = {info.linears for info in found.sites.values()}
    for cross in crosses:
        assert {(f"{cross}.{q}",), (f"{cross}.{k}", f"{cross}.{v}")} < shared
    selves = {path.rpartition(".")[0] for path in linears} - set(crosses)
    assert {tuple(f"{path}.{own}" for own in (q, k, v)) for path in selves} < shared
    check(found, seen)
    report = ptq_cli.gptq(folder / name, calibration=OUT, output="out", group_size=32)
    assert report.totals["calibrated"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava"])
def test_modules_have_their_names_in_transformers(name: str, folder: Path) -> None:
    model = load(folder / name)
    with warnings.catch_warnings(), ptq_cli.capture(model, folder / name, OUT):
        warnings.simplefilter("error")
        model(ids())
    report = ptq_cli.gptq(folder / name, calibration=OUT, output="out", group_size=32)
    assert report.totals["calibrated"]


@pytest.mark.parametrize("name", FUSED)
def test_experts_have_their_own_statistics(name: str, folder: Path) -> None:
    """However the checkpoint stores them, and however they are run."""
    model = load(folder / name)
    with ptq_cli.capture(model, folder / name, OUT):
        model(ids(16, 32))
    sites = {s: info for s, info in statistics().sites.items() if ".experts." in s}
    inputs = [info.n_tokens for info in sites.values() if len(info.linears) == 2]
    assert len(inputs) * 2 == len(sites) > 0
    assert len(set(inputs)) > 1
    options = {"format": "ptq", "group_size": 32, "fallback": "rtn"}
    report = ptq_cli.gptq(folder / name, calibration=OUT, output="out", **options)
    assert report.totals["calibrated"]


def test_experts_of_a_family_that_is_not_known(folder: Path) -> None:
    source = folder / "qwen3_moe_stacked"
    model, hidden = load(source), Path("model")
    shutil.copytree(source, hidden)
    config = json.loads((source / "config.json").read_text())
    (hidden / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with ptq_cli.capture(model, hidden, OUT, sites="sites.toml"):
        model(ids(16, 32))
    seen = {info.linears for info in statistics().sites.values()}
    assert {len(linears) for linears in seen if ".experts." in linears[0]} == {1, 2}
    assert in_recipe(hidden) == seen


class Odd(torch.nn.Module):
    """Calls its modules in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "again", "never"):
            setattr(self, name, torch.nn.Linear(16, 16, bias=False))
        self.other = self.o_proj

    def forward(self, x: Any) -> Any:
        copied = self.v_proj(x.clone()) + self.q_proj(input=x)
        x.mul_(2)  # the same memory, other values
        y = self.k_proj(x) + copied
        for _ in range(3):
            y = self.again(y)
        return self.o_proj(y) + self.other(y[:1])


def odd(kind: type[torch.nn.Module] = Odd) -> Any:
    torch.manual_seed(0)
    model = kind()
    stored = {name: values.detach().numpy() for name, values in model.named_parameters()}
    if "o_proj.weight" in stored:
        stored |= {"other.weight": stored["o_proj.weight"]}
    write_model(Path("model.safetensors"), {f"l.0.{name}": w for name, w in stored.items()})
    return model


def named(name: str) -> str:
    return f"l.0.{name}"


def run(model: Any, *inputs: Any, sites: str | None = None) -> None:
    """Capture it on these."""
    with ptq_cli.capture(model, "model.safetensors", named=named, sites=sites):
        for given in inputs:
            model(given)


def in_recipe(model: Path) -> set[tuple[str, ...]]:
    """The linears of each site in the recipe that a capture wrote."""
    named_there = tomllib.loads(Path("sites.toml").read_text())["sites"]
    sites = recipe_sites(named_there, open_float(model).specs)
    return {tuple(linear.module for linear in site.linears) for site in sites}


def nothing_is_left(model: Any) -> bool:
    hooks = [module for module in model.modules() if module._forward_pre_hooks]
    return not hooks and [path.name for path in Path().iterdir()] == ["model.safetensors"]


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "again")
NEVER = r"no token reached 1 linears, which have no statistics: l\.0\.never; ptq gptq rounds"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modules_called_in_unusual_ways(mode: Any) -> None:
    model = odd()
    seen = plain_hooks(model, {name: named(name) for name in NAMES})
    inputs = [torch.randn(shape) for shape in ((2, 30, 16), (1, 7, 16), (40, 16))]
    with mode(), pytest.warns(UserWarning, match=NEVER):
        run(model, *inputs, sites="sites.toml")
    found = statistics("model.calibration.safetensors")
    assert {info.linears for info in found.sites.values()} == {
        ("l.0.q_proj", "l.0.v_proj"),
        ("l.0.k_proj",),
        ("l.0.again",),
        ("l.0.o_proj", "l.0.other"),  # one module
    }
    assert in_recipe(Path("model.safetensors")) == {info.linears for info in found.sites.values()}
    check(found, {name: [part.detach() for part in parts] for name, parts in seen.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: Any) -> None:
    model = odd().to(dtype)
    seen = plain_hooks(model, {name: named(name) for name in NAMES})
    with pytest.warns(UserWarning, match=NEVER):
        run(model, torch.randn(2, 30, 16, dtype=dtype))
    check(
        statistics("model.calibration.safetensors"),
        {name: [part.float() for part in parts] for name, parts in seen.items()},
    )


class Strange(torch.nn.Module):
    """Linears of names that say nothing, and one that sees another memory each time."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            setattr(self, name, torch.nn.Linear(16, 16, bias=False))

    def forward(self, x: Any) -> Any:
        y = self.a(x) + self.b(x)
        del x
        for _ in range(3):  # memory that was given back is used again
            y = self.c(y + 1) + self.d(y.reshape(y.shape))
        return y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_memory_tells_which_linears_share_an_input_whatever_their_names(mode: Any) -> None:
    model = odd(Strange)
    with mode():
        run(model, *(torch.randn(2, 30, 16) for _ in range(3)), sites="sites.toml")
    assert in_recipe(Path("model.safetensors")) == {
        ("l.0.a", "l.0.b"), ("l.0.c",), ("l.0.d",),
    }  # fmt: skip
    assert "# seen: the same input in every call" in Path("sites.toml").read_text()
    report = ptq_cli.gptq("model.safetensors", output="out", group_size=16)
    assert report.totals["calibrated"]


class Tolerant(Odd):
    """Goes on after any error."""

    def forward(self, x: Any) -> Any:
        try:
            return super().forward(x)
        except InputError:
            return x


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [Odd, Tolerant])
def test_inputs_that_are_no_numbers(value: float, kind: type[Odd]) -> None:
    model, bad = odd(kind), torch.randn(1, 9, 16)
    bad[0, 4, 3] = value
    where = rf"^l\.0\.v_proj, call 2: inputs hold {value} at token 4, channel 3"
    with pytest.raises(InputError, match=where):
        run(model, torch.randn(1, 9, 16), bad)
    assert nothing_is_left(model)


def test_an_exception_inside_leaves_nothing_written() -> None:
    model = odd()
    with pytest.raises(AttributeError, match="no attribute 'clone'"):
        run(model, torch.randn(1, 9, 16), "no tensor")
    assert nothing_is_left(model)


def test_inputs_of_another_width_than_the_weight() -> None:
    model = odd()
    model.v_proj = torch.nn.Linear(8, 16)
    where = r"v_proj, call 1: inputs have 8 features, its weight in the checkpoint 16"
    with pytest.raises(InputError, match=where):
        run(model, torch.randn(3, 8))
    assert nothing_is_left(model)


@pytest.mark.parametrize("name", ["sample", "mixtral"])
def test_a_mask_hides_padding(name: str, folder: Path) -> None:
    source = SAMPLE if name == "sample" else folder / name
    model = load(source)
    tokens = ids(2, 12)
    with ptq_cli.capture(model, source, OUT) as seen:
        seen.mask = torch.tensor([[1] * 12, [1] * 5 + [0] * 7])
        model(tokens, attention_mask=seen.mask)
    entries = statistics().content["sites"]
    experts = {site: entry for site, entry in entries.items() if ".experts." in site}
    assert {entry["n_seen"] for site, entry in entries.items() if site not in experts} == {17}
    inputs = [entry["n_seen"] for entry in experts.values() if len(entry["linears"]) == 2]
    assert sum(inputs) == (2 * 2 * 17 if experts else 0)  # two experts a token, two blocks


def test_a_mask_of_another_size_is_told() -> None:
    model = load(SAMPLE)
    captured = ptq_cli.capture(model, SAMPLE, OUT)
    seen = captured.__enter__()
    seen.mask = np.ones((2, 11))
    model(ids(2, 12))
    with pytest.warns(UserWarning, match=r"the mask was of another size than .* \d+ modules"):
        captured.__exit__(None, None, None)


def test_another_model_is_an_error() -> None:
    with (
        pytest.raises(InputError, match="no module"),
        ptq_cli.capture(torch.nn.Linear(2, 2), SAMPLE, OUT),
    ):
        pass
    with (
        pytest.raises(InputError, match="was called"),
        ptq_cli.capture(load(SAMPLE), SAMPLE, OUT),
    ):
        pass
    with (
        pytest.raises(ptq_cli.PtqError, match="no such folder"),
        ptq_cli.capture(load(SAMPLE), SAMPLE, "nowhere/out.safetensors"),
    ):
        pass
