"""Tasks: data, prompt format and rewards under one name. Importing this loads neither torch nor datasets."""

from estune.tasks.base import Task, data_hash
from estune.tasks.countdown import CountdownConfig

TaskConfig = CountdownConfig
"""Options of any task: one model as long as there is one task, then a union told apart by `name`."""

__all__ = ["CountdownConfig", "Task", "TaskConfig", "data_hash"]
