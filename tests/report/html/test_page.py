"""The page: the report's numbers, nothing from outside, nothing a name can break."""

from __future__ import annotations

import json
import math
import re

import matplotlib
import numpy as np
import pytest

from ptq_cli.report.gates import Gate
from ptq_cli.report.html.allocation import allocation_chart, mix_table
from ptq_cli.report.html.build import page
from ptq_cli.report.html.style import SCRIPT, STYLE
from ptq_cli.report.html.subject import Channels, Distribution, Subject
from ptq_cli.report.html.text import depth_of, kind_of, kinds_of
from tests.report.html import documents
from tests.report.html.reading import cells, read

ACTIVATIONS = {
    part: {"mae": 0.1, "rel_err": error, "sqnr_db": 20.0}
    for part, error in (("integer", 0.0111), ("weight_only", 0.0051), ("plain", 0.0222))
} | {"scheme": "dynamic-token"}
SITE = {
    "site": "model.layers.0.self_attn.q_proj", "linears": [], "fed_by": "model.norm.weight",
    "strength": 0.5, "error": 0.01, "plain_error": 0.02, "function_change": 1e-7,
    "reason": None, "notes": [],
}  # fmt: skip


def whole(layers: list, **more) -> Subject:
    """A run with everything a page can show."""
    for i, row in enumerate(layers):
        row |= {"compared": {"rtn": 0.01 + i, "awq": 0.005}, "best": "awq"}
        row |= {"activations": ACTIVATIONS}
    layers[0]["bits"], layers[0]["bits_per_weight"] = 6, 6.125
    rng = np.random.default_rng(0)
    scales = np.sort(rng.uniform(0.001, 0.1, 25))
    left = {"tensor": "lm_head.weight", "dtype": "BF16", "shape": [9, 9], "reason": "lm_head"}
    document = documents.document(
        layers, quality=documents.QUALITY, sites=[dict(SITE)], left_alone=[left],
        warnings=["a warning"], **more,
    )  # fmt: skip
    document["settings"] = {"allocation": documents.ALLOCATION, **document["settings"]}
    return Subject(
        "out",
        document,
        (Gate("--min-gain", 1.5, 2.0, True, ""), Gate("--max-kl", 0.01, 0.0213, False, "KL is up")),
        tuple(
            Distribution(row["module"], rng.integers(1, 999, 256), rng.integers(0, 99, 24), scales)
            for row in layers[:3]
        ),
        tuple(
            Channels(row["module"], rng.uniform(0.1, 90, 14336).astype(np.float32), smooth)
            for row, smooth in zip(layers, (None, np.ones(14336, np.float32), None), strict=False)
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def one() -> Subject:
    """A run with everything a page can show, of 28 layers."""
    return whole(documents.rows(28))


@pytest.fixture(scope="module")
def pages(one) -> dict[str, str]:
    """The page of that run, and of it beside a smaller one."""
    other = Subject("b", documents.document(documents.rows(7)))
    return {"one": page([one]), "several": page([one, other])}


EACH = pytest.mark.parametrize("which", ["one", "several"])


@pytest.mark.usefixtures("undrawn")
def test_the_page_holds_the_reports_numbers():
    layers = documents.rows(28)
    layers[3]["fallback"] = "not positive definite"
    subject = Subject("out", documents.document(layers))
    root = read(page([subject]))
    tiles = {t.all("dt")[0].text: t.all("strong")[0].text for t in root.all("div") if t.all("dt")}
    totals = subject.document["totals"]
    assert tiles == {
        "Size": "14.90 GiB → 4.38 GiB",
        "Mean error": f"{totals['mean_rel_err']:.3g}",
        "Worst error": f"{totals['worst_rel_err']:.3g}",
        "Gain over round-to-nearest": f"{totals['gain_vs_rtn']:.2f}x",
        "Fallbacks": "1",
    }
    assert "3.40x smaller, 4.12 bits per weight" in root.text
    table = root.by_id("layers")
    shown = {row["Layer"]: row for row in cells(table)}
    assert list(shown) == [
        row["module"].removeprefix("model.layers.")
        for row in sorted(layers, key=lambda row: -row["heldout_rel_err"])
    ]
    exact = {
        row.children[0].text: [c.attributes.get("data-v") for c in row.children]
        for row in table.all("tr")[1:]
    }
    for row in layers:
        name = row["module"].removeprefix("model.layers.")
        assert float(shown[name]["Error"]) == pytest.approx(row["heldout_rel_err"], rel=5e-3)
        assert float(exact[name][1]) == pytest.approx(row["heldout_rel_err"], rel=1e-5)
        assert float(exact[name][2]) == pytest.approx(row["rtn_heldout_rel_err"], rel=1e-5)
        assert shown[name]["Gain"] == f"{row['gain_vs_rtn']:.2f}x"
        assert shown[name]["Shape"] == "×".join(map(str, row["shape"]))
        assert shown[name]["Bits/w"] == f"{row['bits_per_weight']:.2f}"
        assert shown[name]["SQNR, dB"] == f"{row['sqnr_db']:.1f}"
        assert documents.NOTES in shown[name]["Notes"] or not row["notes"]
    assert "fallback: not positive definite" in shown["0.self_attn.o_proj"]["Notes"]


def test_predictions_gates_and_the_rest_stand_there(pages):
    root = read(pages["one"])
    text = root.text
    for words in (
        "6.143 → 6.331", "+0.188 ± 0.011", "93.8 %", "1 missed", "--max-kl 0.01: KL is up",
        "--min-gain 1.5: measured 2", "a warning", "Methods compared", "With integer inputs",
        "KL divergence by block", "lm_head.weight", "1 of 1 sites smoothed",
    ):  # fmt: skip
        assert words in text, words
    assert {"Integer error": "0.0111", "Plain integer": "0.0222"}.items() <= cells(
        root.by_id("layers")
    )[0].items()


def allocated(**said) -> dict:
    """A report of a run that was allocated: seven layers of 4 bits, one of 6."""
    layers = documents.rows(8)
    layers[0] |= {"bits": 6, "bits_per_weight": 6.125}
    quality = json.loads(json.dumps(documents.QUALITY))
    quality["kl"]["quantized"]["standard_error"] = 0.00081
    document = documents.document(layers, quality=quality)
    document["settings"] |= {"allocation": {**documents.ALLOCATION, **said}}
    return document


@pytest.mark.usefixtures("undrawn")
def test_a_prediction_stands_beside_what_was_measured():
    root = read(page([Subject("out", {**allocated(), "layers": []})]))
    tiles = {t.all("dt")[0].text: t.all("dd")[0].text for t in root.all("div") if t.all("dt")}
    said = "0.0198at 4.12 bits per weight; measured 0.0213 ± 0.00081"
    assert tiles["Predicted KL"] == said
    (settings,) = [t for t in root.all("table") if t.attributes["aria-label"] == "Settings"]
    shown = {row["Setting"]: row["Value"] for row in cells(settings)}
    assert shown["allocation"] == "predicted_kl 0.0198, bits_per_weight 4.125, bytes 4700000000"


def test_the_curve_the_choices_and_what_was_measured_are_drawn():
    figure = read(allocation_chart(allocated()))
    assert figure.by_id("allocation-caption").text == (
        "Predicted KL of the best mix at each size, from 0.9 at 2.12 bits per weight to 0.000545 at"
        " 6.03. Chosen: 0.0198 at 4.12. One choice for all layers: W2A16 1.1 at 2.12, W3A16 0.165"
        " at 3.12, W4A16 0.0246 at 4.12, W5A16 0.00368 at 5.12, W6A16 0.00055 at 6.12. Measured:"
        " 0.0213 ± 0.00081."
    )
    texts = [text.text for text in figure.all("text")]
    for words in ("best mix", "one choice for all", "chosen", "measured", "predicted KL, nats"):
        assert words in texts


def test_without_a_run_of_the_model_errors_are_predicted_and_not_compared_with_kl():
    document = allocated(predicted_rel_err=0.5)
    del document["settings"]["allocation"]["predicted_kl"]
    figure = read(allocation_chart(document))
    assert figure.by_id("allocation-title").text == "Bits against predicted sum of errors"
    caption = figure.by_id("allocation-caption").text
    assert "Chosen: 0.5 at 4.12" in caption
    assert "Measured" not in caption
    assert "measured" not in [text.text for text in figure.all("text")]


def test_how_many_layers_have_which_width():
    rows = allocated()["layers"]
    first, second = cells(read(mix_table(rows)))
    assert (first["Numbers"], first["Layers"]) == ("W6A16", "1")
    assert (second["Numbers"], second["Layers"]) == ("W4A16", "7")
    part = 4096 * 4096 / sum(math.prod(row["shape"]) for row in rows)
    assert float(first["Weights"].rstrip("%")) == pytest.approx(100 * part, abs=0.06)
    assert float(first["Mean error"]) == pytest.approx(rows[0]["heldout_rel_err"], rel=5e-3)
    assert mix_table(rows[1:]) == ""


GOOD = documents.ALLOCATION
GARBLED = {
    "empty": {}, "text": "x", "number for a curve": {**GOOD, "curve": 3},
    "nothing for a number": {**GOOD, "predicted_kl": None},
    "half a point": {**GOOD, "curve": [[1]]}, "no curve": {**GOOD, "curve": []},
    "zeros": {**GOOD, "curve": [[0, 0], [0, 0]], "predicted_kl": 0, "uniform": {}},
    "markup": {**GOOD, "uniform": {"<i>x</i>": [4, 0]}},
    "a key of its own": {**GOOD, "<i>y</i>": "<i>z</i>"},
}  # fmt: skip


@pytest.mark.parametrize("said", GARBLED.values(), ids=list(GARBLED))
def test_a_garbled_prediction_has_a_page(said):
    document = documents.document([])
    document["settings"] |= {"allocation": said}
    root = read(page([Subject("out", document)]))
    assert not root.all("i")
    drawn = "Bits against predicted KL" in [title.text for title in root.all("h3")]
    assert drawn == (said in (GARBLED["zeros"], GARBLED["markup"]))


@pytest.mark.slow
def test_300_layers_are_less_than_a_megabyte():
    assert len(page([whole(documents.rows(300))]).encode()) < 1_000_000


@pytest.mark.usefixtures("undrawn")
def test_many_layers_are_cut_and_that_is_said():
    text = page([Subject("out", documents.document(documents.rows(2100)))])
    assert len(cells(read(text).by_id("layers"))) == 2000
    assert "these are the worst 2000 of 2100" in text


@EACH
def test_nothing_comes_from_outside(pages, which):
    text = pages[which]
    assert "://" not in text
    assert "url(" not in text.replace("url(#", "")
    root = read(text)
    for element in root.all():
        for key in ("href", "src", "xlink:href", "action"):
            value = element.attributes.get(key, "#")
            assert value.startswith("#") or value == "data:,", element
    (policy,) = [m for m in root.all("meta") if "http-equiv" in m.attributes]
    assert "default-src 'none'" in policy.attributes["content"]


@EACH
def test_every_chart_says_in_words_what_it_shows(pages, which):
    root = read(pages[which])
    ids = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    figures = root.all("figure")
    assert len(figures) >= (12 if which == "one" else 3)
    for figure in figures:
        for svg in figure.all("svg"):
            assert svg.attributes["role"] == "img"
            title, caption = (root.by_id(i) for i in svg.attributes["aria-labelledby"].split())
            assert title.text.strip()
            assert re.search(r"\d", caption.text), "without a number"
            used = {e.attributes["href"][1:] for e in svg.all() if "href" in e.attributes}
            assert used <= set(ids)


HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a'b&amp;<b>", "$x_{1}$ ${y}",
    "</style></svg></table>", "\u202egnp.exe", "nul\x00esc\x1b[2J", "\ud800", "层.3.注意", "-->]]>",
    "#000001", "9" * 5000, "",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_names_are_text_whatever_they_hold(several):
    """Tensor names, and every other string of a report."""
    layers = [documents.row(f"b.{i}.{name}", (8, 8), 0.01, 0.02) for i, name in enumerate(HOSTILE)]
    for row, name in zip(layers, HOSTILE, strict=True):
        row |= {"notes": [name], "fallback": name, "method": name}
    settings = {"format": HOSTILE[0], "method": HOSTILE[1], HOSTILE[0]: HOSTILE}
    subject = whole(layers, settings=settings)
    subject.document["warnings"].extend(HOSTILE)
    subject.document["sites"][0]["site"] = HOSTILE[0]
    named = Subject(
        HOSTILE[0], subject.document, (Gate(HOSTILE[1], 1, None, False, HOSTILE[0]),),
        subject.distributions, subject.channels,
    )  # fmt: skip
    text = page([named, named] if several else [named])
    text.encode()
    root = read(text)
    assert [script.text for script in root.all("script")] == [SCRIPT]
    assert not root.all("img")
    assert not [e for e in root.all() for key in e.attributes if key.startswith("on")]
    assert "\x00" not in text
    assert "\u202e" not in text
    modules = [row["Layer"] for row in cells(root.by_id("layers"))]
    assert any(name.endswith("<script>alert(1)</script>") for name in modules)
    assert {svg.attributes["role"] for svg in root.all("svg")} == {"img"}


def test_the_same_report_is_the_same_bytes(pages, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 33)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    monkeypatch.setitem(matplotlib.rcParams, "axes.grid", True)
    assert page([whole(documents.rows(28))]) == pages["one"]
    assert matplotlib.rcParams["font.size"] == 33


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [documents.row("lm_head", (4, 4), 0.01, 0.02)],
        [documents.row("lm_head", (4, 4), 0.0, 0.0)],
        [documents.row(f"b.{i}.q_proj", (4, 4), 0.0, 0.0) for i in range(3)],
        [documents.row(f"b.{i}.q_proj", (4, 4), 1e-30 * 10.0**i, 1e20) for i in range(9)],
        [documents.row(f"k{i}", (4, 4), 0.01, 0.02) for i in range(90)],
    ],
    ids=["none", "one", "exact", "all exact", "wide", "many kinds"],
)
def test_odd_reports_have_pages(layers):
    subject = Subject("odd", documents.document(layers))
    for text in (page([subject]), page([subject, subject])):
        shown = [e for e in read(text).all("table") if e.attributes.get("id") == "layers"]
        assert [len(cells(table)) for table in shown] == ([len(layers)] if layers else [])
        assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


@pytest.mark.usefixtures("undrawn")
def test_a_report_without_what_may_be_missing_has_a_page():
    layers = documents.rows(8)
    for row in layers:
        row |= {"heldout_rel_err": None, "rtn_heldout_rel_err": None, "gain_vs_rtn": None}
        row |= {"sqnr_db": None, "damp_percent": None}
    document = documents.document(layers)
    needed = ("layers", "left_alone", "bytes_before", "bytes_after")
    document["totals"] = {key: document["totals"][key] for key in needed}
    document["settings"] = {"format": "gguf"}
    assert "format gguf" in read(page([Subject("bare", document)])).text
    assert "format gguf" in read(page([Subject("a", document), Subject("b", document)])).text


@pytest.mark.usefixtures("undrawn")
def test_layers_of_several_runs_stand_beside_each_other():
    a, b = documents.rows(14, seed=1), documents.rows(15, seed=2)
    root = read(page([Subject("a", documents.document(a)), Subject("b", documents.document(b))]))
    shown = {row["Layer"]: row for row in cells(root.by_id("layers"))}
    assert len(shown) == 15
    for one, two in zip(a, b, strict=False):
        row = shown[one["module"].removeprefix("model.layers.")]
        errors = one["heldout_rel_err"], two["heldout_rel_err"]
        assert [float(row["a"]), float(row["b"])] == pytest.approx(errors, rel=5e-3)
        assert row["Best"] == ("a" if errors[0] < errors[1] else "b")
    assert shown[b[14]["module"].removeprefix("model.layers.")]["a"] == "-"
    assert "The runs do not have the same layers" in root.text
    assert {"Size against error", "Error by kind of layer"} <= {h.text for h in root.all("h3")}


@pytest.mark.usefixtures("undrawn")
def test_runs_measured_on_different_things_are_named():
    a, b = documents.rows(7), documents.rows(7)
    for row in b:
        row |= {"heldout_rel_err": None, "rtn_heldout_rel_err": None}
    subjects = [Subject("a", documents.document(a)), Subject("b", documents.document(b))]
    assert "Errors were not measured on the same: " in page(subjects)


# ---- colours ----


def variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))


LIGHT = variables(STYLE.split("prefers-color-scheme: dark")[0])
DARK = variables(STYLE.split("prefers-color-scheme: dark")[1].split("\n}\n")[0])


def luminance(code: str) -> float:
    parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_from_the_paper(colours):
    assert colours.keys() == LIGHT.keys()
    for paper in ("--paper", "--panel"):
        for text in ("--ink", "--muted", "--accent", "--good", "--bad"):
            assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
    assert contrast(colours["--ink"], colours["--mark"]) >= 4.5
    for mark in ("--ours", "--rtn", *(f"--series-{i}" for i in range(1, 9))):
        assert contrast(colours[mark], colours["--paper"]) >= 3, mark


def test_charts_take_every_colour_and_font_from_the_page(pages):
    for text in pages.values():
        for svg in re.findall(r"<svg.*?</svg>", text, re.S):
            assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= LIGHT.keys()
            styles = "".join(re.findall(r'style="([^"]*)"', svg))
            assert not re.search(r"#[0-9a-f]{3}|font-family|rgb", styles)


# ---- names ----


def test_kinds_and_depths_of_names():
    names = {
        "model.layers.3.self_attn.q_proj": ("q", 3),
        "model.layers.12.mlp.gate_proj": ("gate", 12),
        "model.layers.2.block_sparse_moe.experts.5.w1": ("expert w1", 2),
        "transformer.h.7.attn.c_attn": ("c_attn", 7),
        "blocks.1.mlp.0": ("mlp.0", 1),
        "lm_head": ("lm_head", None),
        "_proj": ("_proj", None),
        f"layers.{'1' * 5000}.q_proj": ("q", None),
        "": ("", None),
    }
    assert {name: (kind_of(name), depth_of(name)) for name in names} == names


def test_kinds_are_ordered_and_the_rare_ones_together():
    rows = [{"module": f"b.{i}.{kind}"} for i in range(3) for kind in ("down_proj", "q_proj", "z")]
    rows += [{"module": f"rare{i}"} for i in range(9)]
    found = kinds_of(rows, 4)
    assert list(found) == ["q", "down", "z", "other"]
    assert sum(map(len, found.values())) == len(rows)
