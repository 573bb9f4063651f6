"""Tasks: records, prompts, training examples and evaluators."""

from __future__ import annotations

from importlib import import_module

from .base import Task

__all__ = ["TASKS", "Task", "get_task"]

TASKS = {
    "completion": "completion:TASK",
    "fact": "fact:TASK",
    "med": "med:TASK",
    "sql": "sql:TASK",
    "world-fact": "world_tasks:FACT",
    "world-mcq": "world_tasks:MCQ",
    "world-sql": "world_tasks:SQL",
}
"""Every task by name: the module in this package and the attribute that holds it."""


def get_task(name: str) -> Task:
    """The task of that name; its module is imported now.

    Raises:
        ValueError: If there is no such task; names the choices.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: choose one of {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(import_module(f".{module}", __name__), attribute)
    return task
