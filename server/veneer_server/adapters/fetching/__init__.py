"""Fetches adapters from URIs, in a process that sees a staging folder and not the store.

`uris` reads a URI, `allowed` says what may be fetched, `fetchers` runs the process and
`process` is what it runs: `sandbox` takes away what it does not need, `addresses` connects,
`web` speaks HTTP, `hub` and `buckets` know where files are.
"""
