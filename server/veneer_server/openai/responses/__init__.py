"""OpenAI's Responses API over the same core as chats, without state.

Start reading at `endpoint`. `fields` has the request's fields, `items` what a conversation may
hold, `requests` makes a chat of them, and `answer` builds responses and their events.
"""
