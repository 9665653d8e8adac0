"""Anthropic's Messages API, without state: a chat in another form.

``turns`` reads conversations, ``answer`` writes messages and their events.
"""
