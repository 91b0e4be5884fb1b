"""Ten families of models against a slow reference; `make families` tries all that there are."""

from __future__ import annotations

import pytest

from support.family_checks import outcome
from support.tiny_families import REGISTERED

SAMPLE = [
    "cohere",
    "gemma2",
    "gpt2",
    "gpt_neo",
    "dots1",
    "llama",
    "mistral",
    "mpt",
    "phi3",
    "smollm3",
]
QUICK = {"gpt2", "llama", "mpt"}
REFUSED = {
    "deepseek_v3": "several key/value shapes",
    "falcon_h1": "caches more than keys and values",
    "cpmant": "caches 40 places for 8 tokens",
    "mamba": "no key/value cache",
    "xlstm": "fails in its own code",
    "roberta": "position ids that start at 0",
}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in QUICK else pytest.mark.recipe)
        for family in SAMPLE
    ],
)
def test_a_family_is_right_in_everything(family: str) -> None:
    found = outcome(family)
    assert not (found.refused or found.not_made or found.refusals or found.wrong), found


@pytest.mark.study
def test_llama_4_reads_text_and_its_layers_of_two_kinds_are_kept_apart() -> None:
    found = outcome("llama4_text")
    assert not (found.refused or found.not_made or found.wrong) and list(found.refusals) == [
        "packages"
    ]
    assert (
        "cannot share a layer: is_moe_layer is True in the one and False in the other"
        in found.refusals["packages"]
    )


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_carry_a_prompt_is_refused_in_one_sentence(family: str) -> None:
    found = outcome(family)
    assert not found.wrong and not found.refusals
    assert found.refused and REFUSED[family] in found.refused and "\n" not in found.refused


def test_the_matrix_is_of_what_the_installed_transformers_offers() -> None:
    assert set(SAMPLE) | set(REFUSED) <= set(REGISTERED)
    assert len(REGISTERED) > 100
