"""Models that are nothing but a config, for tests of their cards, and what a card says."""

from ta_llava.analysis.cost import Cost
from ta_llava.publishing import model_card


def count_nothing(monkeypatch) -> None:
    """For tests that are about other things: counting takes seconds."""
    parts = {"vision tower": 1_000, "projector": 200, "language model": 30_000}
    monkeypatch.setattr(model_card, "count_cost", lambda *_, **__: Cost(parts, {"vision tower": 5_000_000}, 49, 2_000))


def save_config(folder, config) -> None:
    """As a model that nothing else is known of."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
