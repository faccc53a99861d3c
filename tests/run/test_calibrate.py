"""Sums of a site's parts, merged as a tree: the same bytes whoever sums, and the whole's sums."""

from __future__ import annotations

import ast
import json
import os

import numpy as np
import pytest

from ptq_cli.calibration import from_activations as A
from ptq_cli.calibration.from_file import open_calibration
from ptq_cli.numerics.distribution import percentile
from ptq_cli.run.calibrate import SiteJob, first_tasks
from tests.builders import SITES, ptq, random_inputs, small_activations, small_model, tree
from tests.stopping import STAGED, TOLD, killed

PART = 64
TOKENS = 7 * PART + 5  # seven parts, the last a little longer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and activations of seven parts a site; one site's tokens lie in three files."""
    folder = tmp_path_factory.mktemp("tree")
    small_model(folder / "model.safetensors")
    acts = small_activations(folder / "acts", TOKENS)
    (acts / "layers.0.down_proj").mkdir()
    whole = np.load(acts / "layers.0.down_proj.npy")
    (acts / "layers.0.down_proj.npy").unlink()
    for i, piece in enumerate(np.split(whole, [10, 301])):
        np.save(acts / "layers.0.down_proj" / f"{i}.npy", piece)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(A, "PART_TOKENS", PART)


def calibrate(folder, target, *more):
    outcome = ptq(
        *("calibrate", folder / "model.safetensors", "--activations", folder / "acts"),
        *("-o", target, *more),
    )
    assert outcome.code == 0, outcome.err
    return target.read_bytes()


def test_neighbours_are_merged_pairwise_level_by_level():
    def leaves(parts):
        return parts if parts[1] - parts[0] == 1 else tuple(map(leaves, A.halves(parts)))

    for count in range(1, 40):
        level = [(i, i + 1) for i in range(count)]
        while len(level) > 1:
            pairs = [tuple(level[i : i + 2]) for i in range(0, len(level), 2)]
            level = [pair if len(pair) == 2 else pair[0] for pair in pairs]
        assert leaves((0, count)) == level[0]


@pytest.mark.parametrize(
    "heldout", [(8, 512), (8, 20), (3, 100), (5, 0), (0, 512), (1, 9)], ids=str
)
def test_the_tree_gives_the_sums_of_the_whole(tmp_path, folder, heldout, monkeypatch):
    options = ["--heldout-every", heldout[0]]
    options += ["--heldout-limit", heldout[1]] if heldout[0] else []
    calibrate(folder, tmp_path / "one.safetensors", *options)
    monkeypatch.setattr(A, "PART_TOKENS", PART)
    calibrate(folder, tmp_path / "tree.safetensors", *options)
    one, many = (open_calibration(tmp_path / f"{n}.safetensors") for n in ("one", "tree"))
    for site in one.sites:
        a, b = one.load(site), many.load(site)
        assert (a.n_tokens, a.n_seen, a.linears) == (b.n_tokens, b.n_seen, b.linears)
        x, y = a.distribution, b.distribution
        assert (x.minimum, x.maximum) == (y.minimum, y.maximum)
        assert x.mean == pytest.approx(y.mean, rel=1e-5, abs=1e-6)
        assert x.std == pytest.approx(y.std, rel=1e-5)
        assert percentile(x, 0.99) == percentile(y, 0.99)
        assert x.start == y.start
        np.testing.assert_array_equal(x.histogram, y.histogram)
        for exact in ("heldout", "sample", "absmax"):
            np.testing.assert_array_equal(getattr(a, exact), getattr(b, exact), strict=True)
        np.testing.assert_allclose(a.absmean, b.absmean, rtol=1e-6)
        np.testing.assert_allclose(a.hessian, b.hessian, rtol=1e-5, atol=1e-5 * a.hessian.max())
        if heldout[0] != 1:
            assert (a.hessian != b.hessian).any()  # it was cut indeed


@pytest.mark.slow
def test_the_bytes_of_a_tree_do_not_depend_on_the_workers(tmp_path, folder, small_parts):
    one = calibrate(folder, tmp_path / "one.safetensors", "--workers", 1)
    for workers in (2, 3):
        path = tmp_path / f"{workers}.safetensors"
        assert calibrate(folder, path, "--workers", workers) == one
    assert calibrate(folder, tmp_path / "few.safetensors", "--max-memory", "1MB") == one
    assert len(os.listdir(tmp_path)) == 4  # no work folder is left


def test_gptq_reads_activations_as_the_same_tree(tmp_path, folder, small_parts):
    """Directly, or through a file: the same folder but for the name of the source."""
    calibrate(folder, tmp_path / "c.safetensors")
    model = folder / "model.safetensors"
    for name, words in (
        ("file", ["--calibration", tmp_path / "c.safetensors"]),
        ("one", ["--activations", folder / "acts"]),
        ("two", ["--activations", folder / "acts", "--workers", 2]),
    ):
        assert ptq("gptq", model, *words, "-o", tmp_path / name).code == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("file", "one")]
    assert weights[0] == weights[1]
    reports = [(tmp_path / n / "report.json").read_bytes() for n in ("file", "one")]
    assert reports[0] == reports[1]


def test_rtn_reads_the_diagonal_of_the_same_tree(tmp_path, folder, small_parts):
    """Of activations it is all that is summed."""
    calibrate(folder, tmp_path / "c.safetensors")
    words = {"file": tmp_path / "c.safetensors", "acts": folder / "acts"}
    for option, name in (("--calibration", "file"), ("--activations", "acts")):
        model, out = folder / "model.safetensors", tmp_path / name
        assert ptq("rtn", model, option, words[name], "-o", out).code == 0
    for file in ("model.safetensors", "report.json"):
        one, other = ((tmp_path / name / file).read_bytes() for name in words)
        assert one == other


def test_sites_of_one_part_are_as_they_were(tmp_path, folder, monkeypatch):
    """Up to one part and a half."""
    whole = calibrate(folder, tmp_path / "whole.safetensors")
    for part in (TOKENS, TOKENS - 1, TOKENS * 2 // 3 + 1):
        monkeypatch.setattr(A, "PART_TOKENS", part)
        assert calibrate(folder, tmp_path / f"{part}.safetensors") == whole
    monkeypatch.setattr(A, "PART_TOKENS", TOKENS * 2 // 3)
    assert calibrate(folder, tmp_path / "cut.safetensors") != whole


def test_no_more_lies_on_the_disk_than_is_waiting_to_be_merged(
    tmp_path, folder, small_parts, monkeypatch
):
    """A site's parts are merged and dropped before another's are begun."""
    from ptq_cli.storage.units import UnitStore

    most = 0
    put = UnitStore.put

    def watched(self, unit, *rest, **options):
        nonlocal most
        put(self, unit, *rest, **options)
        most = max(most, sum("/" in name for name in kept(self.folder)))

    monkeypatch.setattr(UnitStore, "put", watched)
    calibrate(folder, tmp_path / "c.safetensors", "--workers", 1)
    assert most == 7


def kept(units):
    """Names of the finished units in a folder."""
    return [json.loads(path.read_text())["unit"] for path in units.glob("*.json")]


def test_a_bad_token_is_named_by_its_place_in_its_file(tmp_path, small_parts):
    model = small_model(tmp_path / "model.safetensors")
    bad = random_inputs(TOKENS, SITES["layers.0.o_proj"])
    bad[5 * PART + 9, 4] = np.inf
    acts = small_activations(tmp_path / "acts", TOKENS, **{"layers.0.o_proj": bad})
    for workers in (1, 2):
        outcome = ptq(
            *("calibrate", model, "--activations", acts, "-o", tmp_path / "c.safetensors"),
            *("--workers", workers),
        )
        assert outcome.code == 1
        assert f"inf at token {5 * PART + 9}, channel 4" in outcome.errors[0]
        assert "o_proj.npy" in outcome.errors[0]
        assert not (tmp_path / "c.safetensors").exists()


# ---- resume ----


def parts_of(unit):
    """The parts of a site that a unit holds the sums of."""
    site, _, parts = unit.partition("/")
    return [(site, i) for i in range(*(ast.literal_eval(parts) if parts else (0, 7)))]


def stopped_at(number, function):
    """Ends the run as Ctrl-C does at the `number`-th call."""
    calls = 0

    def stop(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return stop


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(9, id="every ninth"),
        pytest.param(1, id="every one", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", ["put", "drop"])
def test_stopped_at_any_step_it_goes_on_and_ends_with_the_same_bytes(
    tmp_path, folder, small_parts, monkeypatch, method, step
):
    from ptq_cli.storage.units import UnitStore

    whole = calibrate(folder, tmp_path / "whole.safetensors")
    target, number, summed = tmp_path / "c.safetensors", 0, []
    load = A.Activations.load

    def counted(self, site, parts=None):
        summed.append((site, parts))
        return load(self, site, parts)

    monkeypatch.setattr(A.Activations, "load", counted)
    words = ["calibrate", folder / "model.safetensors", "--activations", folder / "acts"]
    while True:
        number += step
        with monkeypatch.context() as patch:
            patch.setattr(UnitStore, method, stopped_at(number, getattr(UnitStore, method)))
            try:
                assert ptq(*words, "-o", target, "--workers", 1).code == 0
                break
            except KeyboardInterrupt:
                pass
        finished = {
            part
            for unit in kept(tmp_path / f"{target.name}.partial/units")
            for part in parts_of(unit)
        }
        summed.clear()
        assert calibrate(folder, target, "--workers", 1) == whole
        assert len(summed) == 21 - len(finished)  # nothing is summed again
        assert not list(tmp_path.glob("*.partial"))
        target.unlink()
    assert number > 21  # three sites of seven parts


def test_a_torn_sum_of_parts_is_made_again_from_the_tokens(
    tmp_path, folder, small_parts, monkeypatch
):
    from ptq_cli.storage.units import UnitStore

    whole = calibrate(folder, tmp_path / "whole.safetensors")
    words = ["calibrate", folder / "model.safetensors", "--activations", folder / "acts"]
    with monkeypatch.context() as patch:
        patch.setattr(UnitStore, "put", stopped_at(5, UnitStore.put))
        with pytest.raises(KeyboardInterrupt):
            ptq(*words, "-o", tmp_path / "c.safetensors", "--workers", 1)
    torn = list((tmp_path / "c.safetensors.partial/units").glob("*.bin"))
    assert torn
    for path in torn:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    assert calibrate(folder, tmp_path / "c.safetensors", "--workers", 2) == whole


def test_parts_that_changed_are_refused(tmp_path, small_parts, monkeypatch):
    from ptq_cli.storage.units import UnitStore

    model = small_model(tmp_path / "model.safetensors")
    acts = small_activations(tmp_path / "acts", TOKENS)
    words = ["calibrate", model, "--activations", acts, "-o", tmp_path / "c.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(UnitStore, "put", stopped_at(6, UnitStore.put))
        with pytest.raises(KeyboardInterrupt):
            ptq(*words, "--workers", 1)
    for path in acts.glob("*.npy"):
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)
    outcome = ptq(*words, "--workers", 1)
    assert outcome.code == 1
    assert "--restart" in outcome.errors[0]
    assert ptq(*words, "--restart").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "place"), [(1, STAGED), (2, TOLD)])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path, folder, small_parts, workers, place
):
    whole = calibrate(folder, tmp_path / "whole.safetensors")
    target = tmp_path / "c.safetensors"
    words = ["calibrate", folder / "model.safetensors", "--activations", folder / "acts"]
    words += ["-o", target, "--workers", workers]
    for number in (2, 4, 5):
        killed(place, number, f"parts={PART}", *words)
        assert kept(tmp_path / "c.safetensors.partial/units")
    assert calibrate(folder, target) == whole


def test_what_a_part_says_of_itself(folder, small_parts):
    from ptq_cli.calibration.sites import match_activations
    from ptq_cli.storage.checkpoint import open_checkpoint
    from ptq_cli.storage.units import UnitStore

    checkpoint = open_checkpoint(folder / "model.safetensors")
    source = match_activations(checkpoint, [folder / "acts"], bf16=False)
    site = "layers.0.q_proj"
    job = SiteJob(site, source, UnitStore(folder / "none"), source.all_parts(site))
    first = first_tasks(job)
    assert [task.name for task in first[:2]] == [
        "layers.0.q_proj, part 1 of 7",
        "layers.0.q_proj, part 2 of 7",
    ]
    assert len(first) == 7
    assert job.task().name == site  # which merges them
