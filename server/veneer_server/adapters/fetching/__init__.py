"""Fetches adapters from URIs, in a process that has access to a staging folder, not the store.

`uris` parses URIs, `allowed` is the allow-list, `fetchers` starts the process, and `process` is
its main module. In the process, `sandbox` drops the rights that it does not need, `addresses`
connects, `web` speaks HTTP, and `places` and `buckets` know where files are.
"""
