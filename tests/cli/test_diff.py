"""`ptq diff`: what changed, and whether it became worse."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.builders import ptq
from tests.report.html import documents


@pytest.fixture
def before() -> dict:
    return documents.document(documents.rows(14), quality=documents.QUALITY)


def reports(tmp_path: Path, before: dict, **changes: float) -> tuple[Path, Path]:
    """Two reports; `changes` are factors on values of the second: totals, `perplexity`, `kl`,
    `layer` (the first layer's error)."""
    after = copy.deepcopy(before)
    for name, factor in changes.items():
        if name == "layer":
            after["layers"][0]["heldout_rel_err"] *= factor
        elif name == "perplexity":
            after["quality"]["perplexity"]["quantized"] *= factor
        elif name == "kl":
            after["quality"]["kl"]["quantized"]["mean"] *= factor
        else:
            value = after["totals"][name]
            after["totals"][name] = type(value)(factor * value)
    return (
        documents.write(tmp_path / "before.json", before),
        documents.write(tmp_path / "after.json", after),
    )


def test_equal_reports_have_no_difference(tmp_path, before):
    outcome = ptq("diff", *reports(tmp_path, before))
    assert (outcome.code, outcome.out, outcome.err) == (0, "no difference\n", "")


@pytest.mark.parametrize(
    ("change", "name", "worse", "better"),
    [
        ("mean_rel_err", "mean error", 1.03, 0.97),
        ("worst_rel_err", "worst error", 1.03, 0.97),
        ("gain_vs_rtn", "gain over RTN", 0.97, 1.03),
        ("bytes_after", "size in bytes", 1.03, 0.97),
        ("bits_per_weight", "bits per weight", 1.03, 0.97),
        ("perplexity", "perplexity", 1.03, 0.97),
        ("kl", "mean KL", 1.03, 0.97),
        ("layer", "model.layers.0.self_attn.q_proj", 1.03, 0.97),
    ],
)
def test_worse_by_more_than_the_tolerance_is_exit_code_3(
    tmp_path, before, change, name, worse, better
):
    paths = reports(tmp_path, before, **{change: worse})
    outcome = ptq("diff", *paths, "--tolerance", "0.029")
    assert outcome.code == 3
    assert outcome.errors == [
        f"ptq: error: worse by more than 2.9 %: {name} {'+' if worse > 1 else '-'}3 %"
    ]
    (line,) = [line for line in outcome.out.splitlines() if line.strip().startswith(name)]
    assert line.split()[-1] == "worse"
    assert ptq("diff", *paths, "--tolerance", "0.031").code == 0
    assert ptq("diff", *paths, "--tolerance", "0").code == 3
    paths = reports(tmp_path, before, **{change: better})
    outcome = ptq("diff", *paths, "--tolerance", "0")
    assert (outcome.code, outcome.errors) == (0, [])
    assert "better" in outcome.out
    assert "worse" not in outcome.out


def test_the_document_says_the_same(tmp_path, before):
    paths = reports(tmp_path, before, mean_rel_err=1.5, bytes_after=0.5)
    outcome = ptq("diff", *paths, "--json")
    assert outcome.code == 3
    document = outcome.document
    assert document["totals"]["mean error"]["worse"] == pytest.approx(0.5)
    assert document["totals"]["mean error"]["missed"] is True
    assert document["totals"]["size in bytes"]["worse"] == pytest.approx(-0.5)
    assert document["totals"]["size in bytes"]["missed"] is False
    assert (document["missed"], document["tolerance"], document["same"]) == (1, 0.01, False)


def test_from_nothing_is_worse_at_any_tolerance(tmp_path, before):
    before["totals"]["fallbacks"] = 0
    after = copy.deepcopy(before)
    after["totals"]["fallbacks"] = 2
    paths = [documents.write(tmp_path / f"{i}.json", d) for i, d in enumerate((before, after))]
    outcome = ptq("diff", *paths, "--tolerance", "1000")
    assert outcome.code == 3
    assert "fallbacks from 0 to 2" in outcome.errors[0]
    document = ptq("diff", *paths, "--json").document
    assert document["totals"]["fallbacks"]["worse"] is None
    assert ptq("diff", *reversed(paths)).code == 0


def test_settings_and_layers_that_came_or_went(tmp_path, before):
    after = copy.deepcopy(before)
    after["settings"] |= {"bits": 3, "alpha": 0.5}
    del after["layers"][1], after["layers"][4]
    after["layers"].append(documents.row("model.extra", (4, 4), 0.01, 0.02))
    paths = [documents.write(tmp_path / f"{i}.json", d) for i, d in enumerate((before, after))]
    outcome = ptq("diff", *paths)
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "alpha: unset -> 0.5",
        "bits: 4 -> 3",
        "1 layers added: model.extra",
        "2 layers removed: model.layers.0.{self_attn.k_proj, mlp.up_proj}",
    ]
    document = ptq("diff", *paths, "--json").document
    assert document["settings"]["bits"] == {"before": 4, "after": 3}
    assert document["added"] == ["model.extra"]


def test_losing_the_calibration_is_worse(tmp_path, before):
    after = copy.deepcopy(before)
    after["totals"] |= {"calibrated": False, "heldout": False}
    paths = [documents.write(tmp_path / f"{i}.json", d) for i, d in enumerate((before, after))]
    outcome = ptq("diff", *paths)
    assert outcome.code == 3
    assert "not comparable: only the errors before are those of outputs" in outcome.out
    assert ptq("diff", *reversed(paths)).code == 0


def test_folders_are_compared_by_their_reports(job):
    for bits in (4, 3):
        assert ptq("gptq", job, "--activations", "acts", "--bits", bits, "-o", f"w{bits}").code == 0
    worse = ptq("diff", "w4", "w3")
    assert worse.code == 3
    assert "bits: 4 -> 3" in worse.out
    stored = [json.loads(Path(f"w{bits}/report.json").read_text()) for bits in (4, 3)]
    before, after = (document["totals"]["mean_rel_err"] for document in stored)
    (line,) = [line for line in worse.out.splitlines() if line.startswith(" mean error")]
    assert line.split()[2:4] == [f"{before:.4g}", f"{after:.4g}"]
    assert ptq("diff", "w4/report.json", "w4").out == "no difference\n"


def test_the_table_is_as_long_as_asked(tmp_path, before):
    after = copy.deepcopy(before)
    for row in after["layers"]:
        row["heldout_rel_err"] *= 0.9
    paths = [documents.write(tmp_path / f"{i}.json", d) for i, d in enumerate((before, after))]
    assert "... and 11 more (--top 0 shows all)" in ptq("diff", *paths, "--top", "3").out
    assert ptq("diff", *paths, "--top", "0").out.count("better") == 14


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf", "x"])
def test_a_tolerance_is_a_fraction(tmp_path, before, tolerance):
    assert ptq("diff", *reports(tmp_path, before), "--tolerance", tolerance).code == 2
