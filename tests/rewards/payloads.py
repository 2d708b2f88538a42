"""What a completion may say to the one that reads it: programs in every language that a grader could be made to run."""

from __future__ import annotations


def programs(canary: str) -> list[str]:
    """Texts each of which makes a file `canary` where somebody evaluates it in the way that it is written for."""
    touch = f"__import__('pathlib').Path({canary!r}).touch()"
    shell = f"touch {canary}"
    subclasses = "().__class__.__base__.__subclasses__()"
    return [
        touch,
        f"open({canary!r}, 'w')",
        f"[c for c in {subclasses} if c.__name__ == 'catch_warnings'][0]()._module.sys.modules['os'].system({shell!r})",
        f"(lambda: {touch})()",
        f"[{touch}]",
        f"[[{touch}]]",
        f"{{'a': {touch}}}",
        f"f'{{{touch}}}'",
        f"'{{0.__class__}}'.format({touch})",
        f"x + {touch}",
        f"1 if {touch} else 2",
        f"[1][{touch}]",
        f"sqrt({touch})",
        f"sqrt({touch!r})",
        f"sympify({touch!r})",
        f"S({touch!r})",
        f"Rational({touch!r}, 1)",
        f"Symbol('x').__class__.__init__.__globals__['sympify']({touch!r})",
        f"1\n{touch}",
        f"1 # \n{touch}",
        f"x\\\n{touch}",
        f"1\x00{touch}",
        f"\ufeff{touch}",
        f"!!python/object/apply:os.system ['{shell}']",
        f"cos\nsystem\n(S'{shell}'\ntR.",
        f"{{{{ cycler.__init__.__globals__.os.system('{shell}') }}}}",
        f"{{% for x in [1] %}}{{{{ x.__class__.__base__.__subclasses__() }}}}{{% endfor %}}{touch}",
        f"\\input{{|{shell}}}",
        f"\\immediate\\write18{{{shell}}}",
        f"\\text{{{touch}}}",
        f"\\{{{touch}, 1\\}}",
        f"\\frac{{{touch}}}{{2}}",
        f"\\mathrm{{eval}}({touch!r})",
        f"x = {touch}",
        f"1, {touch} and 2",
        f"$({shell})",
        f"`{shell}`",
        f"; {shell}",
        f'{{"__reduce__": "os.system", "args": ["{shell}"]}}',
        f'["{touch}"]',
    ]


ODD = [
    *("\u0663+\u0664", "\U0001d7d9+\U0001d7da", "\u00b2", "\x00", "\ud800", "\ufeff", "\u202e1"),
    *("nan", "-inf", "None", "[[]]", "{}", "[{}]", "1e999999", "oracle_answer", "%s%n{0}", "a" * 64 + "b"),
    *("9" * 400 + "+1j", "[" + "9" * 400 + "-1j]"),
    *("(" * 5000, "[" * 5000, "{" * 5000, "-" * 5000, "9" * 5000, "\\" * 999, "\n" * 9000),
]
"""Texts that a careless reader stumbles over: digits of other scripts, halves of characters, numbers without a
float, depth, length."""

BOMBS = ["9**9**9", "9**9**9**9", "(" + "9**" * 50 + "9)", r"44^{35^{19}}", "1e999999999", "R999999999"]
"""Texts whose value takes for ever."""

LONG = ["a" * 1_000_000, "1+" * 500_000 + "1", "(" * 1_000_000, "\n" * 1_000_000]
"""Texts that are too long."""
