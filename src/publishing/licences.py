"""Licences of the parts that a model is made of."""

import re
from collections.abc import Sequence


# Of weights that derive from these; all else is not known.
_LICENCES = {
    r"google/gemma-((1\.1|2|3)-)?\d+[bm](-.*)?": "gemma",  # later ones have another
    r"meta-llama/Llama-2-.*|lmsys/vicuna-.*-v1\.5.*|llava-hf/llava-1\.5-.*": "llama2",
    r"meta-llama/Meta-Llama-3-.*": "llama3",
    r"meta-llama/(Meta-)?Llama-3\.1-.*": "llama3.1",
    r"meta-llama/Llama-3\.2-.*": "llama3.2",
    r"meta-llama/Llama-3\.3-.*": "llama3.3",
}
# Where each is to be read, and what it asks those to write who pass the weights on.
LICENCE_TERMS = {
    "gemma": (
        "https://ai.google.dev/gemma/terms",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    "llama2": (
        "https://ai.meta.com/llama/license/",
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3": (
        "https://www.llama.com/llama3/license/",
        "Built with Meta Llama 3. Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta "
        "Platforms, Inc. All Rights Reserved.",
    ),
    **{
        f"llama3.{minor}": (
            f"https://www.llama.com/llama3_{minor}/license/",
            f"Built with Llama. Llama 3.{minor} is licensed under the Llama 3.{minor} Community License, Copyright © Meta "
            "Platforms, Inc. All Rights Reserved.",
        )
        for minor in (1, 2, 3)
    },
}


def find_licence(names: Sequence[str]) -> str | None:
    return next((found for name in names for pattern, found in _LICENCES.items() if re.fullmatch(pattern, name)), None)
