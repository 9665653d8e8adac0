"""The gateway's endpoints, a module for each kind. `routes` puts them together.

`core` holds what all of them use, `json_endpoint` what those have in common that read a body.
"""
