"""The parts of a model: what is trained, and how its parameters are counted."""

from training_runs import MODEL
from transformers import AutoModelForImageTextToText

from ta_llava.training.parts import count_parameters, train_only


def test_parameters_are_counted_once():
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    train_only(model, ["language_model"])
    counts = count_parameters(model)
    assert sum(map(sum, counts.values())) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["language_model"][0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_image_index_embeddings_are_of_the_prefix():
    model = AutoModelForImageTextToText.from_pretrained(MODEL, num_image_index_embeddings=2)
    train_only(model, ["prefix"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"model.prefix_embedding.weight", "model.image_index_embedding.weight"}
    assert sum(map(sum, count_parameters(model).values())) == sum(
        parameter.numel() for parameter in model.parameters()
    )
