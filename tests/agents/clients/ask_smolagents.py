"""Lets an agent of smolagents call a tool and end, by tool calls and by code."""

import os

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool


@tool
def capital(country: str) -> str:
    """Gives the capital of a country.

    Args:
        country: The country's name.
    """
    return {"France": "Paris"}[country]


model = OpenAIModel(
    model_id=os.environ["OPENAI_MODEL"],
    api_base=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
)
for kind in (ToolCallingAgent, CodeAgent):
    agent = kind(tools=[capital], model=model, max_steps=3, verbosity_level=0)
    print(f"{kind.__name__}:", agent.run("What is the capital of France?"))
