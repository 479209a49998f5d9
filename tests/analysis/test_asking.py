"""What is asked, and the words of an answer."""

import torch

from ta_llava.analysis.asking import split_words


def test_tokens_are_put_together_to_words():
    pieces = ["<bos>", "A", " red", " cir", "cle", ".", "\n", "Yes", "</s>"]

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "".join(pieces[i] for i in ids if not pieces[i].startswith("<"))

    words = split_words(Tokenizer(), torch.arange(len(pieces)))
    assert words == [("A", [1]), ("red", [2]), ("circle.", [3, 4, 5]), ("Yes", [6, 7])]
    assert split_words(Tokenizer(), torch.tensor([0, 8])) == []
