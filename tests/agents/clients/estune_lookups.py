"""A taskset of verifiers whose capitals are to be looked up with a tool."""

from collections.abc import Iterator

import verifiers.v1 as vf
from estune_lookup_tools import Lookup

__all__ = ["LookupTaskset"]


class LookupConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class LookupTask(vf.Task[vf.TaskData, vf.State, LookupConfig]):
    @classmethod
    def toolsets(cls, config: LookupConfig) -> list[vf.Toolset]:
        return [Lookup(config.tools)]

    @vf.reward
    async def told(self, trace: vf.Trace) -> float:
        return float(any("Paris" in str(m.content) for m in trace.tool_messages) and "Paris" in trace.last_reply)


class LookupsConfig(vf.TasksetConfig):
    task: LookupConfig = LookupConfig()


class LookupTaskset(vf.Taskset[LookupTask, LookupsConfig]):
    def load(self) -> Iterator[LookupTask]:
        yield LookupTask(vf.TaskData(prompt="What is the capital of France?"), self.config.task)
