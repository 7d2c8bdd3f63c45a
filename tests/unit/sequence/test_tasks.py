"""The table of tasks: its numbers, and rows that cannot be meant."""

import pytest

from symbiotic_titan.extend import Task, register_task
from symbiotic_titan.sequence.tasks import TASKS, task_names, task_number


def test_numbers_of_our_tasks_stay_and_others_follow():
    assert [task_number(name) for name in ("lm", "mmu", "t2i", "t2i_long", "interleaved")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    with TASKS.temporarily():
        register_task(Task("rewrite", (("text",),)))
        assert task_number("rewrite") == 5 and task_names()[5] == "rewrite"
    assert len(TASKS) == 5


def test_a_name_is_taken_once():
    with (
        TASKS.temporarily(),
        pytest.raises(
            ValueError,
            match=r"data.sources.task: 'lm' is already registered .*; choose another name",
        ),
    ):
        register_task(Task("lm", (("text",),)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"schemas": (("image", "captoin"),)},
            "task 'mine': schemas has the unknown field 'captoin'; choose from text, image, caption",
        ),
        (
            {"schemas": (("text",),), "trained_fields": ("caption",)},
            "task 'mine': trained_fields has 'caption', which no schema has; choose from text",
        ),
        (
            {"schemas": (("question", "answer"),)},
            r"task 'mine': no layout is known for samples of question \+ answer; choose from text, .*, or set layout",
        ),
        (
            {"schemas": ("image", "caption")},
            r"task 'mine': schemas must be a tuple of tuples of texts, such as .*, got \('image', 'caption'\)",
        ),
        (
            {"schemas": (("text",),), "target_images": "many"},
            "task 'mine': target_images must be one of none, one, any, got 'many'",
        ),
        ({"schemas": ()}, "task 'mine': schemas is empty; name the fields"),
        ({"name": "my task", "schemas": (("text",),)}, "task 'my task': a name has only letters"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Task(**({"name": "mine"} | row))


def test_what_follows_from_the_images_of_a_task():
    asked = {name: TASKS[name] for name in TASKS}
    assert [n for n, t in asked.items() if t.is_understanding] == ["lm", "mmu"]
    assert [n for n, t in asked.items() if t.is_cacheable] == ["t2i", "t2i_long"]
    assert [n for n, t in asked.items() if not t.has_images] == ["lm"]
