"""A taskset of verifiers: capitals to name."""

import asyncio
import os
import signal
from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["CapitalTaskset"]

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}


class CapitalData(vf.TaskData):
    answer: str
    fault: str = ""


class CapitalTask(vf.Task[CapitalData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        if self.data.fault == "raise":
            raise ValueError("no luck")
        if self.data.fault == "hang":
            await asyncio.sleep(1000)
        if self.data.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return float(self.data.answer in trace.last_reply)

    @vf.metric
    async def characters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class CapitalConfig(vf.TasksetConfig):
    fault: str = ""
    system: str | None = None
    countries: tuple[str, ...] = tuple(CAPITALS)


class CapitalTaskset(vf.Taskset[CapitalTask, CapitalConfig]):
    def load(self) -> Iterator[CapitalTask]:
        for country in self.config.countries:
            data = CapitalData(
                name=country,
                prompt=f"Name the capital of {country}.",
                system_prompt=self.config.system,
                answer=CAPITALS[country],
                fault=self.config.fault,
            )
            yield CapitalTask(data, self.config.task)
