"""Calls of tools in a model's answer: one parser for each family of chat templates.

`hermes`, `llama3` and `mistral` read calls that the model chose to make, `forced` those that a
constraint made it write. `families` selects one.
"""
