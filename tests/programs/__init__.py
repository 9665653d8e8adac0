"""Programs that nobody here wrote, each with its documented defaults, against a real server.

A program's module in ``checks`` has functions named ``check_*``, which fail as tests do.
`make programs` installs the programs into an environment of their own, since their ranges of
openai, rich and others are not the suite's. `tests/integration/test_programs.py` runs each
module as a process of that environment.
"""
