from ta_llava.easy_vqa_data import QUESTION_TYPES
from ta_llava.evaluate_easy_vqa import evaluate_easy_vqa, format_table
from ta_llava.inference import DEFAULT_LLAVA, load


def test_the_shipped_model_answers_a_sample_of_the_test_questions():
    """All 9,673 questions are `make evaluate-tiny`; the README says what they give."""
    results = evaluate_easy_vqa(*load(), num_questions=600)
    assert results["all"]["questions"] == 600
    assert results["all"]["accuracy"] >= 0.99
    assert set(results) == {*QUESTION_TYPES, "all"}
    assert sum(results[name]["questions"] for name in QUESTION_TYPES) == 600
    for name in QUESTION_TYPES:
        assert results[name]["accuracy"] > results[name]["prior"]


def test_the_shipped_llava_answers_a_sample_of_the_test_questions():
    results = evaluate_easy_vqa(*load(DEFAULT_LLAVA), num_questions=600)
    assert results["all"]["accuracy"] >= 0.97


def test_the_table():
    row = {"questions": 10, "accuracy": 0.9, "prior": 0.5}
    assert format_table({"all": row}).splitlines()[-1] == "| all | 10 | 90.00% | 50.00% |"
