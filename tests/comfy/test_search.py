"""What a person types into the node search: the main node of a family is found by its own words, before any node that helps it.

The front end matches names, display names and aliases; matches by alias alone are ordered by length, so that an alias that two nodes carry
shows the one with the shorter name first.
"""

from __future__ import annotations

from collections import Counter

import pytest

OWN = {
    "ConceptKitErase": [
        *("erase", "erase concept", "unlearn", "forget", "remove concept", "remove object", "remove style", "delete concept", "censor"),
        *("replace concept", "ablate", "safety", "nsfw", "uce", "mace", "rece"),
    ],
    "ConceptKitDecompose": [
        *("decompose", "decompose concept", "explain", "explain word", "explain prompt", "interpret", "interpretability", "bias"),
        *("what does the model think", "what is a word", "analyse", "analyze", "word mix"),
    ],
    "ConceptKitAdjustWords": ["reweight", "token weight", "concept slider"],
    "ConceptKitSaveEmbedding": ["textual inversion"],
    "ConceptKitConceptor": ["conceptor"],
    "ConceptKitSaveEditLora": ["export lora"],
    "ConceptKitEditConditioning": ["fp8", "gguf"],
}


@pytest.fixture(scope="module")
def searched(comfy):
    """What is looked at of each of the pack's nodes, in lower case."""
    nodes = {name: node for name, node in comfy.get("/object_info").items() if name.startswith("ConceptKit") and name != "ConceptKitProbe"}
    return {
        name: ([name.lower(), node["display_name"].lower()], [alias.lower() for alias in node["search_aliases"]])
        for name, node in nodes.items()
    }


def test_no_alias_belongs_to_two_nodes(searched):
    carried = Counter(alias for _, aliases in searched.values() for alias in aliases)
    assert not [alias for alias, count in carried.items() if count > 1]


@pytest.mark.parametrize(("name", "query"), [(name, query) for name, queries in OWN.items() for query in queries])
def test_its_own_words_find_a_node_first(searched, name, query):
    names, aliases = searched[name]
    assert any(query in text for text in (*names, *aliases))
    if any(text.startswith(query) for text in names):
        return  # the best match there is
    others = {other: [text for text in (*texts[0], *texts[1]) if query in text] for other, texts in searched.items() if other != name}
    assert not {other: found for other, found in others.items() if found}
