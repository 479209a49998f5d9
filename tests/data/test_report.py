"""The report on what was kept and left out."""

from ta_llava.data.report import DataReport


def test_the_report_says_it_all():
    report = DataReport(kept=3, text_only=1, too_long=2, bad=4, max_length=64)
    assert str(report) == "3 of 10 samples kept; left out: 1 without an image, 2 over 64 tokens, 4 bad"
