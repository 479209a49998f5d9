"""The 16 instructions: prompts that state them, and checkers that tell answers which follow from near misses."""

import dataclasses
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ta_llava.evaluation.instruction_following import (
    TASKS,
    Prompt,
    build_prompts,
    check,
    description_request,
    load_checkers,
    prompt_from_description,
    score,
)


ITEMS = [
    (["cat.png"], "What is the animal doing?"),
    (["a.png", "b.png"], "Which of the two is older? "),
    ([], "What is a cat?"),
]
ANSWER = "The cat sleeps on a red chair."

# Per task its arguments, answers that follow it, and answers that do not.
CASES = {
    "no_commas": (
        {},
        ["A cat and a dog.", "1.5 m; or so", "an Arabic comma، is another sign"],
        ["A cat, a dog", "All there is is a cat,", "1,000 cats"],
    ),
    "lowercase": (
        {},
        ["a cat.", "red", "it is 3 o'clock, isn't it?", "ein hund", "où est-il ?"],
        ["A cat.", "a cat. it is Red", "the word is oK", "3", "..."],
    ),
    "uppercase": (
        {},
        [
            "A RED BUS",
            "RED",
            "IT IS 3 O'CLOCK.",
            "A MAN RIDING A WAVE ON A SURFBOARD.",
            "OÙ EST-IL ?",
        ],
        ["A RED bUS", "IT IS RED. a", "Red", "3", "..."],
    ),
    "placeholders": (
        {"num_placeholders": 2},
        ["[name] lives in [city].", "[a][b]", "[a] [b] [c]", "[] []"],
        ["[name] lives here.", "[name lives in city]", "(name) lives in {city}", "[name] in [city", "[a\nb] [c]"],
    ),
    "postscript": (
        {"postscript_marker": "P.S."},
        [
            "A cat.\n\nP.S. It sleeps.",
            "A cat. p.s. it sleeps",
            "A cat.\nP. S. It sleeps.",
            "A cat.\nP.P.S. It sleeps.",
        ],
        ["A cat.\nPS: It sleeps.", "A cat.\nPostscript: It sleeps.", "A cat.\nP.S", "The C.P.U. sleeps."],
    ),
    "title": (
        {},
        ["<<A cat>>\nIt sleeps.", "It sleeps. <<the end>>", "<<<A cat>>>"],
        ["<A cat>\nIt sleeps.", "<<>> It sleeps.", "<< >>", "<<A cat>", "<<A\ncat>>", "«A cat»", "# A cat"],
    ),
    "keywords": (
        {"keywords": ["light", "corner"]},
        ["Light falls into the corner.", "It is highlighted; CORNERS too.", "corner light"],
        ["Light falls into the room.", "corn er light", "The l-ight is in the corner."],
    ),
    "highlights": (
        {"num_highlights": 2},
        ["A *cat* on a *chair*.", "A **cat** on a **chair**.", "*a* **b**", "*a* *b* *c*"],
        ["A *cat* on a chair.", "A **cat** on a chair.", "A *cat on a chair", "* * * *", "*a\nb* *c*", "_a_ _b_"],
    ),
    "json": (
        {},
        ['{"animal": "cat"}', '```json\n{"animal": "cat"}\n```', '```\n["cat"]\n```', "3", '"cat"', " \n[1]\n"],
        [
            "{'animal': 'cat'}",
            '{"animal": "cat",}',
            '{"animal": "cat"',
            'Here it is: {"animal": "cat"}',
            '```json\n{"animal": "cat"}\n```\nThat is all.',
            '{"a": 1} {"b": 2}',
            "cat",
            "[" * 100_000,
        ],
    ),
    "sections": (
        {"num_sections": 2, "section_spliter": "Section"},
        [
            "Section 1\nA cat.\nSection 2\nA dog.",
            "Section 1: a Section 2: b Section 3: c",
            "**Section 1**\na\n**Section 2**\nb",
        ],
        ["Section 1\nA cat.", "SECTION 1\na\nSECTION 2\nb", "Section A\na\nSection B\nb", "Part 1\na\nPart 2\nb"],
    ),
    "bullet_points": (
        {"num_bullets": 2},
        ["* a cat\n* a dog", "- a cat\n- a dog", "I see:\n  * a cat\n  - a dog\nNo more."],
        [
            "* a cat",
            "* a cat\n* a dog\n* a cow",
            "1. a cat\n2. a dog",
            "• a cat\n• a dog",
            "a * b\nc - d",
            "**a**\n**b**",
        ],
    ),
    "sentence_count": (
        {"num_sentences": 2, "relation": "at least"},
        ["A cat. It sleeps.", "What?! It sleeps!", "Is it a cat? Yes", "No. No. No."],
        [
            "A cat.",
            "A cat that sleeps",
            "Dr. Smith has 3.5 cats.",
            "* a cat\n* a dog",
            "He waits...",
            "Really!!",
            "It is 5 p.m. here",
        ],
    ),
    "word_count": (
        {"num_words": 4, "relation": "at least"},
        ["a cat sleeps here", "the cat doesn't", "a well-known cat", "1 2 3 4 5"],
        ["a cat sleeps", "a cat - - - sleeps !", "well-known cat"],
    ),
    "two_responses": (
        {},
        ["A cat.\n******\nA dog.", "A cat.******A cat", "******\nA cat.\n******\nA dog.\n******"],
        [
            "A cat.\n******\nA cat. ",
            "A cat.\n*****\nA dog.",
            "A cat.\n******\n",
            "A cat.\n******\nA dog.\n******\nA cow.",
            "A cat.\n******\n******\nA dog.",
            "A cat or a dog.",
        ],
    ),
    "end_phrase": (
        {"end_phrase": "I hope this helps."},
        [
            "A cat. I hope this helps.",
            "A cat.\ni HOPE this helps. \n",
            '"A cat. I hope this helps."',
            "I hope this helps.",
        ],
        [
            "A cat. I hope this helps",
            "A cat. I hope this helps!",
            "I hope this helps. A cat.",
            "A cat. I hope that helps.",
        ],
    ),
    "start_phrase": (
        {"starter": "In my view"},
        ["In my view it is a cat.", "\n  In my view, a cat.", "In my view", "In my viewpoint\nthere is more."],
        [
            "A cat. In my view it sleeps.",
            "A cat.\nIn my view it sleeps.",
            "in my view it is a cat",
            '"In my view" it is',
        ],
    ),
}


def test_the_tasks_are_those_of_the_paper_in_its_order():
    assert list(TASKS) == list(CASES) and len(TASKS) == 16
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
def test_answers_that_follow_and_near_misses(name):
    arguments, following, failing = CASES[name]
    assert [answer for answer in following if not TASKS[name].check(answer, arguments)] == []
    assert [answer for answer in failing if TASKS[name].check(answer, arguments)] == []


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("answer", ["", "  \n\t "])
def test_an_empty_answer_fails(name, answer):
    assert TASKS[name].check(answer, CASES[name][0]) is False


@pytest.mark.parametrize("name", ["sentence_count", "word_count"])
def test_less_than_is_the_opposite_of_at_least(name):
    arguments, following, failing = CASES[name]
    arguments = {**arguments, "relation": "less than"}
    assert not any(TASKS[name].check(answer, arguments) for answer in following)
    assert all(TASKS[name].check(answer, arguments) for answer in failing)


@pytest.mark.parametrize(
    ("name", "one", "more"),
    [
        ("placeholders", "[a] ", "num_placeholders"),
        ("highlights", "*a* ", "num_highlights"),
        ("sections", "Section 1\n", "num_sections"),
        ("bullet_points", "* a\n", "num_bullets"),
        ("sentence_count", "It is a cat. ", "num_sentences"),
        ("word_count", "cat ", "num_words"),
    ],
)
def test_one_too_few_fails(name, one, more):
    for count in (2, 3, 20):
        arguments = {**CASES[name][0], more: count}
        assert TASKS[name].check(one * count, arguments)
        assert not TASKS[name].check(one * (count - 1), arguments)
        assert TASKS[name].check(one * (count + 1), arguments) == (name != "bullet_points")


def test_other_arguments_are_checked_too():
    assert check_one("postscript", "A cat.\nP.P.S. It sleeps.", postscript_marker="P.P.S")
    assert not check_one("postscript", "A cat.\nP.S. It sleeps.", postscript_marker="P.P.S")
    assert check_one("sections", "SECTION 1\na", num_sections=1, section_spliter="SECTION")
    assert not check_one("keywords", "a cat and a dog", keywords=["cat", "dog", "cow"])


def test_signs_of_phrases_and_keywords_stand_for_themselves():
    assert check_one("keywords", "It costs $5 (about).", keywords=["$5", " (about) "])
    assert not check_one("keywords", "abc", keywords=["a.c"])
    assert check_one("start_phrase", "Well? (Yes.) It is.", starter="Well? (Yes.) ")
    assert not check_one("start_phrase", "Wel it is.", starter="Well?")
    assert check_one("end_phrase", "It is. Isn't it? (Yes.)", end_phrase="Isn't it? (Yes.)")
    assert TASKS["start_phrase"].describe({"starter": "{x}"}).endswith(": {x}")


def check_one(name: str, answer: str, **arguments) -> bool:
    return TASKS[name].check(answer, arguments)


# --- prompts -------------------------------------------------------------------------------------------------------


def test_every_item_gets_every_task():
    prompts = build_prompts(ITEMS)
    assert [prompt.task for prompt in prompts] == [*TASKS] * 3
    for index, prompt in enumerate(prompts):
        images, question = ITEMS[index // 16]
        assert prompt.images == images and prompt.question == question
        assert prompt.prompt == f"{question.strip()}\n{TASKS[prompt.task].describe(prompt.arguments)}"


def test_prompts_are_those_of_their_seed():
    items = [([f"{index}.png"], "What is it?") for index in range(30)]
    prompts = build_prompts(items, seed=1)
    random.seed(5)
    assert build_prompts(iter(items), seed=1) == prompts
    assert build_prompts(items[:3], seed=1) == prompts[: 3 * 16]
    others = build_prompts(items, seed=2)
    for name, task in TASKS.items():
        drawn = [[p.arguments for p in some if p.task == name] for some in (prompts, others)]
        assert (drawn[0] != drawn[1]) == bool(task.choices)
        for argument, choices in task.choices.items():  # all of a few are asked for
            values = {str(arguments[argument]) for arguments in drawn[0]}
            assert len(values) >= min(len(choices), 4)


def test_the_instruction_states_its_arguments():
    for prompt in build_prompts([(["a.png"], "What is it?")] * 20):
        assert "{" not in prompt.prompt and "  " not in prompt.prompt
        for value in prompt.arguments.values():
            for item in value if isinstance(value, list) else [value]:
                assert str(item) in prompt.prompt.removeprefix("What is it?")


def test_no_keyword_is_within_another():
    keywords = {word for pair in TASKS["keywords"].choices["keywords"] for word in pair}
    assert not any(one != other and one in other for one in keywords for other in keywords)


def test_prompts_survive_json():
    items = [([Path("a") / "cat.png", "https://example.com/a.png"], "What is it?")]
    prompts = build_prompts(items)
    assert prompts[0].images == [str(Path("a") / "cat.png"), "https://example.com/a.png"]
    lines = [json.dumps(dataclasses.asdict(prompt)) for prompt in prompts]
    assert [Prompt(**json.loads(line)) for line in lines] == prompts


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no questions"),
        ([(["a.png"], "What?"), (["b.png"], " \n")], r"question of item 1, about \['b.png'\], is empty"),
        ([(["a.png"], None)], "question of item 0"),
        ([("a.png", "What?")], "images of item 0 must be a list, got 'a.png'; put one image in a list"),
    ],
)
def test_items_that_cannot_be_asked(items, message):
    with pytest.raises(ValueError, match=message):
        build_prompts(items)


# --- scores --------------------------------------------------------------------------------------------------------


def test_scores_per_task_and_their_average():
    prompts = build_prompts(ITEMS[:2])
    following = [CASES[prompt.task][1][0] for prompt in prompts]
    prompts = [dataclasses.replace(prompt, arguments=CASES[prompt.task][0]) for prompt in prompts]
    results = score(prompts, iter(following))
    assert list(results) == [*TASKS, "average"]
    assert all(results[name] == {"asked": 2, "success_rate": 1.0} for name in TASKS)
    assert results["average"] == {"asked": 32, "success_rate": 1.0}

    answers = [CASES["no_commas"][2][0], *following[1:15], "", *following[16:]]
    results = score(prompts, answers)
    assert {name for name in TASKS if results[name]["success_rate"] == 0.5} == {"no_commas", "start_phrase"}
    assert results["average"]["success_rate"] == pytest.approx(15 / 16)
    assert score(prompts, [""] * 32)["average"]["success_rate"] == 0


def test_the_average_is_over_tasks_not_prompts():
    prompts = [prompt for prompt in build_prompts(ITEMS) if prompt.task in ("no_commas", "uppercase")][:3]
    results = score(prompts, ["a cat", "a cat", "a cat, a dog"])
    assert results == {
        "no_commas": {"asked": 2, "success_rate": 0.5},
        "uppercase": {"asked": 1, "success_rate": 0.0},
        "average": {"asked": 3, "success_rate": 0.25},
    }


def test_what_cannot_be_scored():
    prompts = build_prompts(ITEMS[:1])
    with pytest.raises(ValueError, match="no prompts"):
        score([], [])
    with pytest.raises(ValueError, match="16 prompts but 15 answers"):
        score(prompts, [ANSWER] * 15)
    with pytest.raises(ValueError, match="must be text, got None"):
        score(prompts, [None] * 16)
    with pytest.raises(ValueError, match="There is no task 'rhyme'; the tasks are no_commas, lowercase"):
        check(dataclasses.replace(prompts[0], task="rhyme"), ANSWER)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("title", {"num_words": 3}, "title takes the arguments: none; got: num_words"),
        ("placeholders", {}, "placeholders takes the arguments: num_placeholders; got: none"),
        ("placeholders", {"num_placeholders": 0}, "whole number from 1, got 0"),
        ("bullet_points", {"num_bullets": "2"}, "whole number from 1, got '2'"),
        ("bullet_points", {"num_bullets": True}, "whole number from 1, got True"),
        ("word_count", {"num_words": 3, "relation": "about"}, "one of less than, at least, got 'about'"),
        ("postscript", {"postscript_marker": "("}, r"one of P.S., P.P.S, got '\('"),
        ("keywords", {"keywords": []}, r"list of words, got \[\]"),
        ("keywords", {"keywords": "cat"}, "list of words, got 'cat'"),
        ("keywords", {"keywords": ["cat", " "]}, "list of words"),
        ("end_phrase", {"end_phrase": " "}, "text that is not empty, got ' '"),
        ("start_phrase", {"starter": None}, "text that is not empty, got None"),
    ],
)
def test_arguments_of_another_task(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        TASKS[name].check(ANSWER, arguments)
    with pytest.raises(ValueError, match=message):
        TASKS[name].describe(arguments)


# --- the upper limit -----------------------------------------------------------------------------------------------


def test_the_upper_limit_asks_about_the_description_alone():
    prompts = build_prompts(ITEMS[:2])
    assert description_request(prompts[0].images) == (["cat.png"], "Describe this image in detail.")
    images, request = description_request(prompts[-1].images)
    assert images == ["a.png", "b.png"] and "each of these 2 images" in request
    for prompt in prompts:
        second = prompt_from_description(prompt, f" {ANSWER}\n")
        assert second.images == [] and second.prompt.endswith(f"{ANSWER}\n\n{prompt.prompt}")
        assert (second.task, second.arguments) == (prompt.task, prompt.arguments)
        assert check(second, ANSWER) == check(prompt, ANSWER)
        assert prompt.images  # as it was
    assert prompt_from_description(prompts[0], "").prompt.endswith(prompts[0].prompt)
    with pytest.raises(ValueError, match="no image to describe"):
        description_request([])


# --- without the checkers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["punkt", "lm_eval.tasks.ifeval", "langdetect"])
def test_only_checking_needs_the_checkers(monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    path = ROOT / "src" / "evaluation" / "instruction_following.py"
    spec = importlib.util.spec_from_file_location("instruction_following_alone", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    prompts = module.build_prompts(ITEMS)
    with pytest.raises(ValueError, match=r"pip install 'ta-llava\[evaluate\]'"):
        module.score(prompts, [ANSWER] * len(prompts))


def test_nothing_is_downloaded_and_nothing_printed(monkeypatch, capfd):
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *arguments: pytest.fail("nltk.download was called"))
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    load_checkers.cache_clear()
    load_checkers()
    load_checkers.cache_clear()
    assert capfd.readouterr() == ("", "")
