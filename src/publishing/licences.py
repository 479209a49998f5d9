"""Licences of the published weights: which one holds for weights that derive from others, and what it asks for."""

import re
from collections.abc import Iterable
from typing import NamedTuple


CODE_LICENCE = "apache-2.0"  # of this package, and of the models that it ships

# Repos whose weights have a licence that binds weights derived from them. Others are not known.
LICENCES = {
    r"google/gemma-((1\.1|2|3)-)?\d+[bm](-.*)?": "gemma",  # later versions have another
    r"meta-llama/Llama-2-.*|lmsys/vicuna-.*-v1\.5.*|llava-hf/llava-1\.5-.*": "llama2",
    r"meta-llama/Meta-Llama-3-.*": "llama3",
    r"meta-llama/(Meta-)?Llama-3\.1-.*": "llama3.1",
    r"meta-llama/Llama-3\.2-.*": "llama3.2",
    r"meta-llama/Llama-3\.3-.*": "llama3.3",
}


class LicenceTerms(NamedTuple):
    """
    Args:
        url (`str`): Where the licence can be read.
        notice (`str`): What those who pass the weights on must write.
    """

    url: str
    notice: str


LICENCE_TERMS = {
    "gemma": LicenceTerms(
        "https://ai.google.dev/gemma/terms",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    "llama2": LicenceTerms(
        "https://ai.meta.com/llama/license/",
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3": LicenceTerms(
        "https://www.llama.com/llama3/license/",
        "Built with Meta Llama 3. Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta "
        "Platforms, Inc. All Rights Reserved.",
    ),
    **{
        f"llama3.{minor}": LicenceTerms(
            f"https://www.llama.com/llama3_{minor}/license/",
            f"Built with Llama. Llama 3.{minor} is licensed under the Llama 3.{minor} Community License, Copyright © Meta "
            "Platforms, Inc. All Rights Reserved.",
        )
        for minor in (1, 2, 3)
    },
}


def find_licence(names: Iterable[str]) -> str | None:
    """The licence of the first of the Hub repos that has a known one."""
    return next((found for name in names for pattern, found in LICENCES.items() if re.fullmatch(pattern, name)), None)
