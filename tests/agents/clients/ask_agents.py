"""Runs an agent of OpenAI's Agents SDK that calls a tool, whole and streamed."""

import asyncio
import os

from agents import Agent, AsyncOpenAI, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled


@function_tool
def capital(country: str) -> str:
    """Gives the capital of a country."""
    return {"France": "Paris"}[country]


async def main() -> None:
    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(model=os.environ["OPENAI_MODEL"], openai_client=AsyncOpenAI())
    agent = Agent(name="Guide", instructions="Be brief.", model=model, tools=[capital])
    whole = await Runner.run(agent, "What is the capital of France?")
    print("whole:", whole.final_output)
    streamed = Runner.run_streamed(agent, "What is the capital of France?")
    async for _ in streamed.stream_events():
        pass
    print("streamed:", streamed.final_output)


asyncio.run(main())
