"""A server of OpenEnv, at a port: a number to guess, three times at most."""

import socket
import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Guess(Action):
    text: str


class Hint(Observation):
    said: str


class Guessing(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, most=9, **_):
        self.number = 1 + (seed or 0) % most
        self.tries = 0
        return Hint(said=f"Guess my number from 1 to {most}.")

    def step(self, action, **_):
        self.tries += 1
        right = str(self.number) in action.text.split()
        done = right or self.tries == 3
        return Hint(said="Yes." if right else "No.", reward=1.0 if right else -0.25, done=done)

    @property
    def state(self):
        return State(step_count=self.tries)


app = create_fastapi_app(Guessing, Guess, Hint, max_concurrent_envs=int(sys.argv[1]))
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="critical")).run([listening])
