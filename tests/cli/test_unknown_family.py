"""A model of a family that nobody knows: what shares an input is derived, a recipe of it can be
checked, and commands that need more say what can be done."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.builders import ptq, random_inputs, read_model
from tests.cli.tiny_folders import WIDE, WIDTH, dense_block, ends, llama, model_folder
from tests.refusals import refused

BLOCK = "model.layers.0."
WORDS = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}


@pytest.fixture
def known() -> Path:
    """A Llama of one block, with a file of activations for each of its sites."""
    model = model_folder(Path("known"), "llama", {**ends(), **dense_block(BLOCK)})
    with_activations(model, "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")
    return model


@pytest.fixture
def hidden(known: Path) -> Path:
    """The same by another name."""
    shutil.copytree(known, "hidden")
    config = json.loads((known / "config.json").read_text())
    Path("hidden/config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    return Path("hidden")


def with_activations(model: Path, *linears: str) -> None:
    folder = model / "activations"
    folder.mkdir()
    for linear in linears:
        np.save(folder / f"{BLOCK}{linear}.npy", random_inputs(96, WIDTH))
    np.save(folder / f"{BLOCK}mlp.down_proj.npy", random_inputs(96, WIDE))


def checked(recipe: str) -> Path:
    """The recipe of somebody who found that all that may feed a site does."""
    fed = re.sub(r"^# (?=(norm|after|layout|heads) = )", "", recipe, flags=re.MULTILINE)
    Path("sites.toml").write_text(fed)
    return Path("sites.toml")


def test_siblings_share_activations_as_in_a_known_family(hidden: Path, known: Path) -> None:
    outcomes = [ptq("gptq", model, "-o", f"{model}-out", "-g", 32) for model in (known, hidden)]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert len([text for text in outcomes[1].warnings if "likely see those of" in text]) == 1
    same_weights("known-out", "hidden-out")


def same_weights(*folders: str) -> None:
    first, second = (read_model(Path(folder, "model.safetensors")) for folder in folders)
    assert first == second


def test_a_checked_recipe_folds_as_a_known_family_does(hidden: Path, known: Path) -> None:
    recipe = ptq("inspect", hidden, "--sites")
    assert recipe.code == 0, recipe.err
    assert recipe.out.splitlines()[0].startswith("# Sites of hidden, derived from config.json")
    assert "# likely: named as in known families\n[[sites]]\nlinears = [" in recipe.out
    quick = ("--n-grid", 2, "--no-compare", "-g", 32)
    with_sites = ptq("awq", hidden, "--config", checked(recipe.out), *quick, "-o", "hidden-out")
    assert with_sites.code == 0, with_sites.err
    assert ptq("awq", known, *quick, "-o", "known-out").code == 0
    same_weights("known-out", "hidden-out")


def test_a_recipe_as_it_is_written_feeds_nothing(hidden: Path) -> None:
    Path("sites.toml").write_text(ptq("inspect", hidden, "--sites").out)
    outcome = ptq("inspect", hidden, "--json")
    assert {site["fed_by"] for site in outcome.document["sites"]} == {None}
    assert {site["certainty"] for site in outcome.document["sites"]} == {"sure", "likely"}
    assert ptq("gptq", hidden, "--config", "sites.toml", "-g", 32, "-o", "out").code == 0


@pytest.mark.parametrize("command", ["awq", "smoothquant"])
def test_commands_that_fold_want_to_know_what_feeds_a_site(hidden: Path, command: str) -> None:
    words = (
        "hidden: no sites are known", "model_type 'unheard_of' is not known", "1 sure, 3 likely",
        "ptq inspect --sites", "--config", "families known: bamba,",
    )  # fmt: skip
    refused(command, hidden, words=words)


def test_tokens_say_the_families_and_the_ways_on(hidden: Path) -> None:
    np.save("tokens.npy", np.zeros((2, 4), np.int32))
    words = (
        "no forward for model_type 'unheard_of'; known are ", "llama,", "--activations",
        "ptq_cli.capture", "[[sites]]", "ptq inspect --sites",
    )  # fmt: skip
    refused("gptq", hidden, "--tokens", "tokens.npy", words=words)


def test_siblings_that_likely_share_are_warned_of() -> None:
    tensors = {
        re.sub("|".join(WORDS), lambda word: WORDS[word[0]], name): weight
        for name, weight in {**ends(), **dense_block(BLOCK)}.items()
    }
    model = model_folder(Path("model"), "unheard_of", tensors)
    with_activations(model, "self_attn.wq", "self_attn.wo", "mlp.up_proj")
    outcome = ptq("gptq", model, "-o", "out", "-g", 32)
    assert outcome.code == 0, outcome.err
    assert [text for text in outcome.warnings if "likely" in text] == [
        "ptq: warning: 3 linears have no activations of their own and likely see those of their"
        f" siblings: {BLOCK}{{self_attn.{{wk,wv}}, mlp.gate_proj}}; ptq inspect --sites says why"
    ]


def test_inspect_says_how_sure_it_is(hidden: Path) -> None:
    outcome = ptq("inspect", hidden)
    said = " ".join(outcome.out.split())
    assert "model_type 'unheard_of' is not known" in said
    assert "sites by names and shapes (ptq inspect --sites): 1 sure, 3 likely" in said
    assert "64 inputs, likely: named as in known families" in said
    assert "likely: named as in known families" in ptq("inspect", hidden, "--tensors").out


def test_no_recipe_where_none_is_needed_or_none_can_be() -> None:
    model = llama(Path("model"))
    words = ("model: its family is known (llama), and so are its sites", "--tensors shows them")
    refused("inspect", model, "--sites", words=words)
    bare = model_folder(Path("bare"), "unheard_of", ends())
    refused("inspect", bare, "--sites", words=("no linears have names with the number of a block",))
    assert ptq("inspect", model, "--sites", "--json").code == 2
