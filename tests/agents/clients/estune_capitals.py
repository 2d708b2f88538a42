"""A taskset of verifiers: capitals to name."""

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["CapitalTaskset"]

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}


class CapitalData(vf.TaskData):
    answer: str


class CapitalTask(vf.Task[CapitalData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @vf.metric
    async def characters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class CapitalConfig(vf.TasksetConfig):
    countries: tuple[str, ...] = tuple(CAPITALS)


class CapitalTaskset(vf.Taskset[CapitalTask, CapitalConfig]):
    def load(self) -> Iterator[CapitalTask]:
        for country in self.config.countries:
            data = CapitalData(name=country, prompt=f"Name the capital of {country}.", answer=CAPITALS[country])
            yield CapitalTask(data, self.config.task)
