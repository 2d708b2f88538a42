"""A server of tools, as verifiers starts it."""

import verifiers.v1 as vf


class Lookup(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    def capital(self, country: str) -> str:
        """Gives the capital of a country."""
        return {"France": "Paris"}[country]


if __name__ == "__main__":
    Lookup.run()
