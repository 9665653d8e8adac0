"""Mutated URIs, links, redirects and folder drops: ``python -m tests.fetching``.

The real code, in this process, among web servers and folders of its own. After each case:

- nothing outside the roots was read: no file of the secret folder was opened, and none of its
  bytes came out
- only allowed addresses were contacted, for allowed paths, and with a token where it belongs
- no folder was published before it was whole

Planted bugs must be found. Every case has its own seed, so that one can be run alone.
"""
