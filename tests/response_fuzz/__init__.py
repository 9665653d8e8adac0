"""Random requests to ``/v1/responses``: whole and streamed they must be the
same, and say what a chat says."""
