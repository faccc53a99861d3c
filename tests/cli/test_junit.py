"""`--junit`: what a build server reads of layers and gates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.builders import SAMPLE, ptq, random_weight, small_activations, write_model

# The elements of junit-10.xsd (Jenkins' xunit plugin): attributes (those with ! must be there),
# children in any order.
XSD = {
    "testsuites": ("name time tests failures disabled errors", {"testsuite"}),
    "testsuite": (
        "name! tests! failures! errors! time disabled skipped timestamp hostname id package",
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "properties": ("", {"property"}),
    "property": ("name! value!", set()),
    "testcase": (
        "name! classname! time assertions status",
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": ("type message", set()),
    "system-out": ("", set()),
}


def read(path):
    """The one suite of a JUnit file, after it was held against the schema."""
    root = ElementTree.fromstring(Path(path).read_bytes())
    assert root.tag == "testsuites"
    for element in root.iter():
        words, children = XSD[element.tag]
        known = {word.rstrip("!") for word in words.split()}
        assert set(element.attrib) <= known, element.tag
        assert {word[:-1] for word in words.split() if word[-1] == "!"} <= set(element.attrib)
        assert {child.tag for child in element} <= children
        assert re.fullmatch(r"\d+\.\d{3}", element.get("time", "0.000"))
    (suite,) = root
    cases = suite.findall("testcase")
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)
    failures = suite.findall("testcase/failure")
    for element in (root, suite):
        assert element.get("tests") == str(len(cases))
        assert element.get("failures") == str(len(failures))
        assert element.get("errors") == "0"
    return suite


def cases(suite, kind):
    """Name → failure (or None) of the testcases of a kind."""
    found = suite.findall("testcase")
    own = [case for case in found if case.get("classname").endswith(f".{kind}")]
    return {case.get("name"): case.find("failure") for case in own}


def test_gates_that_are_missed(job):
    outcome = ptq(
        *("gptq", job, "--activations", "acts", "-o", "out", "--json", "--report", "r.json"),
        *("--junit", "j.xml", "--max-rel-err", "0.0035", "--min-gain", "1.01"),
    )
    assert outcome.code == 3
    document = outcome.document
    assert json.loads(Path("r.json").read_text()) == document
    suite = read("j.xml")
    over = {row["module"] for row in document["layers"] if row["heldout_rel_err"] > 0.0035}
    assert 0 < len(over) < 4  # both kinds are there
    layers = cases(suite, "layers")
    assert set(layers) == {row["module"] for row in document["layers"]}
    assert {name for name, failure in layers.items() if failure is not None} == over
    gates = cases(suite, "gates")
    assert set(gates) == {"--max-rel-err 0.0035", "--min-gain 1.01"}
    assert gates["--min-gain 1.01"] is None
    assert f"{len(over)} layers are above it" in gates["--max-rel-err 0.0035"].get("message")
    assert gates["--max-rel-err 0.0035"].get("type") == "max-rel-err"
    assert gates["--max-rel-err 0.0035"].get("message") in outcome.errors[0]
    for case in suite.findall("testcase"):
        if case.get("name") in layers:
            row = next(r for r in document["layers"] if r["module"] == case.get("name"))
            said = dict(line.split(" ", 1) for line in case.find("system-out").text.splitlines())
            assert float(said["heldout_rel_err"]) == pytest.approx(row["heldout_rel_err"], rel=1e-5)
            assert float(said["gain_vs_rtn"]) == pytest.approx(row["gain_vs_rtn"], rel=1e-5)
            assert float(case.get("time")) == pytest.approx(row["seconds"], abs=1e-3)


def test_without_gates_nothing_fails(job):
    assert ptq("rtn", job, "--activations", "acts", "-o", "out", "--junit", "j.xml").code == 0
    suite = read("j.xml")
    assert (suite.get("tests"), suite.get("failures")) == ("4", "0")
    assert cases(suite, "gates") == {}


def test_only_times_differ(job):
    for name in "ab":
        outcome = ptq("pack", job, "-o", "out", "--force", "--junit", f"{name}.xml")
        assert outcome.code == 0
    a, b = (re.sub(r'time="[\d.]+"', "", Path(f"{name}.xml").read_text()) for name in "ab")
    assert a == b


def test_names_with_control_characters(tmp_path):
    names = ("\x1b[2J", "a\x00b", "<&\"'>", "a\nb", "\u202e", "模型", "\ufffe")
    weights = {f"{name}.weight": random_weight(4, 8) for name in names}
    model = write_model(tmp_path / "m.safetensors", weights)
    assert ptq("pack", model, "-o", "out", "--junit", "j.xml", "--max-rel-err", "1e-9").code == 3
    layers = cases(read("j.xml"), "layers")
    assert len(layers) == len(names)
    assert {"<&\"'>", "模型", "\\x1b[2J", "a\\nb", "a\\x00b"} <= set(layers)
    assert all(failure is not None for failure in layers.values())


def test_eval_with_the_gates_on_predictions(sample):
    assert ptq("pack", sample, "-o", "out").code == 0
    tokens = ("--tokens", SAMPLE / "eval_tokens.npy", "--nsamples", 2)
    gates = ("--max-kl", "1e-6", "--max-perplexity-increase", "100", "--max-fallbacks", "0")
    assert ptq("eval", sample, "out", *tokens, *gates, "--junit", "j.xml").code == 3
    found = cases(read("j.xml"), "gates")
    missed = {name: failure is not None for name, failure in found.items()}
    assert missed == {
        "--max-fallbacks 0": True, "--max-kl 1e-06": True, "--max-perplexity-increase 100": False,
    }  # fmt: skip


@pytest.mark.parametrize("command", ["awq", "smoothquant"])
def test_smoothers(command, one_block):
    fast = ["--no-compare", "--n-grid", "2"] if command == "awq" else []
    assert ptq(command, one_block, *fast, "-o", "out", "--junit", "j.xml").code == 0
    assert len(cases(read("j.xml"), "layers")) == 7


def test_smoothed_floats_have_a_testcase_for_each_site(one_block):
    assert ptq("smoothquant", one_block, "--bits", "16", "-o", "out", "--junit", "j.xml").code == 0
    suite = read("j.xml")
    assert len(cases(suite, "sites")) == int(suite.get("tests")) == 4


def test_where_it_cannot_be_written_is_said_before_the_work(job, tmp_path):
    small_activations(tmp_path / "acts")
    for path, words in (
        ("j.json", "JUnit"), ("no/j.xml", "no such folder"), ("acts", "JUnit"),
    ):  # fmt: skip
        outcome = ptq("gptq", job, "--activations", "acts", "-o", "out", "--junit", path)
        assert outcome.code == 1
        assert words in outcome.errors[0]
        assert not Path("out").exists()
