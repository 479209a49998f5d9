"""The licences of published weights."""

from ta_llava.publishing.licences import LICENCE_TERMS, LICENCES


def test_each_licence_has_its_terms():
    assert set(LICENCES.values()) == LICENCE_TERMS.keys()
